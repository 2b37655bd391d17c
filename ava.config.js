// The tests in test/kvm need real KVM, in an emulated machine, and take minutes: `npm run test:kvm` runs them alone. The short
// one is among the others, too.
const kvm = process.env.LOOPGUEST_TEST_KVM === "1";

export default {
  files: kvm ? ["test/kvm/**/*.test.ts"] : ["test/**/*.test.ts", "!test/kvm/!(short).test.ts"],
  extensions: { ts: "module" },
  nodeArguments: ["--import=tsx"],
  workerThreads: false,
  ...(kvm ? { concurrency: 1 } : {}),
  timeout: kvm ? "15m" : "6m",
};
