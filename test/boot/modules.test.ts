import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { gzipSync } from "node:zlib";
import test, { type ExecutionContext } from "ava";
import * as Effect from "effect/Effect";
import { ModuleError, moduleName, readModule, resolveModules } from "../../src/boot/modules.ts";

/** A folder with these files, removed after the test. */
function folderWith(t: ExecutionContext, files: Readonly<Record<string, string | Uint8Array>>): string {
  const folder = mkdtempSync(join(tmpdir(), "loopguest-modules-"));
  t.teardown(() => rmSync(folder, { recursive: true, force: true }));
  for (const [path, data] of Object.entries(files)) {
    mkdirSync(dirname(join(folder, path)), { recursive: true });
    writeFileSync(join(folder, path), data);
  }
  return folder;
}

const resolve = (folder: string, ...wanted: Array<string>) => Effect.runSync(resolveModules(folder, wanted));
const names = (result: { files: ReadonlyArray<{ name: string }> }) => result.files.map((file) => file.name);

const tree = {
  "modules.dep": [
    "kernel/net/virtio_net.ko: kernel/net/net_failover.ko kernel/core/failover.ko",
    "kernel/net/net_failover.ko: kernel/core/failover.ko",
    "kernel/core/failover.ko:",
    "kernel/fs/overlay.ko:",
    "kernel/sound/snd-dummy.ko: kernel/sound/snd-core.ko",
    "kernel/sound/snd-core.ko:",
    "",
  ].join("\n"),
  "modules.builtin": "kernel/drivers/virtio/virtio_ring.ko\nkernel/fs/ext4/ext4.ko\n",
};

test("dependencies come first and nothing comes twice", (t) => {
  const result = resolve(folderWith(t, tree), "virtio_net", "overlay", "failover", "virtio-net");
  t.deepEqual(names(result), ["failover", "net_failover", "virtio_net", "overlay"]);
});

test("paths are absolute and belong to the modules", (t) => {
  const folder = folderWith(t, tree);
  t.deepEqual(resolve(folder, "overlay").files, [
    { name: "overlay", path: join(folder, "kernel/fs/overlay.ko") },
  ]);
});

test("a hyphen and an underscore are one", (t) => {
  t.deepEqual(names(resolve(folderWith(t, tree), "snd_dummy")), ["snd_core", "snd_dummy"]);
  t.is(moduleName("kernel/a/b-c.ko.zst"), "b_c");
});

test("what the kernel holds is skipped, and what is nowhere is named", (t) => {
  const result = resolve(folderWith(t, tree), "virtio-ring", "ext4", "nonsense", "overlay");
  t.deepEqual(result.builtin, ["virtio_ring", "ext4"]);
  t.deepEqual(result.missing, ["nonsense"]);
  t.deepEqual(names(result), ["overlay"]);
});

/** The least ELF64 file that has a .modinfo section: a header, three section headers, two sections. */
function moduleWith(modinfo: string): Buffer {
  const sectionNames = "\0.modinfo\0.shstrtab\0";
  const file = Buffer.alloc(64 + 3 * 64);
  file.write("\x7fELF\x02\x01\x01", 0, "latin1");
  file.writeBigUInt64LE(64n, 0x28);
  file.writeUInt16LE(64, 0x3a);
  file.writeUInt16LE(3, 0x3c);
  file.writeUInt16LE(2, 0x3e);
  const section = (index: number, name: number, offset: number, size: number) => {
    const at = 64 + index * 64;
    file.writeUInt32LE(name, at);
    file.writeBigUInt64LE(BigInt(offset), at + 0x18);
    file.writeBigUInt64LE(BigInt(size), at + 0x20);
  };
  section(1, 1, file.length, modinfo.length);
  section(2, 10, file.length + modinfo.length, sectionNames.length);
  return Buffer.concat([file, Buffer.from(modinfo, "latin1"), Buffer.from(sectionNames, "latin1")]);
}

test("without modules.dep the modules themselves are asked", (t) => {
  const folder = folderWith(t, {
    "virtio_net.ko": moduleWith("license=GPL\0depends=net-failover,failover\0name=virtio_net\0"),
    "deeper/net-failover.ko": moduleWith("depends=failover\0"),
    "deeper/failover.ko.gz": gzipSync(moduleWith("depends=\0")),
  });
  t.deepEqual(names(resolve(folder, "virtio_net")), ["failover", "net_failover", "virtio_net"]);
});

test("modules.order says where modules are; what it does not list is looked for", (t) => {
  const folder = folderWith(t, {
    "modules.order": "kernel/a/virtio_net.ko\nkernel/a/net-failover.ko\nkernel/a/my_virtio_net.ko\n",
    "modules.builtin": "kernel/b/failover.ko\n",
    "kernel/a/virtio_net.ko": moduleWith("depends=net-failover,failover,by_hand\0"),
    "kernel/a/net-failover.ko.gz": gzipSync(moduleWith("depends=\0")),
    "updates/by-hand.ko": moduleWith("depends=\0"),
    // Not in the list, and not looked at: the list goes before. A walk would meet one of them first.
    "a/virtio_net.ko": "odd",
    "z/virtio_net.ko": "odd",
  });
  const result = resolve(folder, "virtio_net", "nowhere");
  t.deepEqual(names(result), ["net_failover", "by_hand", "virtio_net"]);
  t.deepEqual(result.builtin, ["failover"]);
  t.deepEqual(result.missing, ["nowhere"]);
  t.is(result.files[0].path, join(folder, "kernel/a/net-failover.ko.gz"));
  const [unpacked] = result.files.map((file) => Effect.runSync(readModule(file)).data);
  t.is(Buffer.from(unpacked).toString("latin1", 1, 4), "ELF");
});

test("a name is found whole, and not where another depends on it", (t) => {
  const folder = folderWith(t, {
    "modules.dep": "a/x_blk.ko: a/blk.ko a/my-x.ko\na/my-x.ko:\na/x.ko.gz:\n/abs/blk.ko:",
  });
  const at = (name: string) => resolve(folder, name).files.at(-1)?.path;
  t.is(at("x"), join(folder, "a/x.ko.gz"));
  t.is(at("blk"), "/abs/blk.ko");
  t.is(at("my_x"), join(folder, "a/my-x.ko"));
  t.deepEqual(resolve(folder, "k", "x.").missing, ["k", "x."]);
});

test("a .ko that is no module is refused by name", async (t) => {
  const folder = folderWith(t, { "odd.ko": "just text" });
  const error = await t.throwsAsync(Effect.runPromise(resolveModules(folder, ["odd"])));
  t.true(error instanceof ModuleError);
  t.regex(error.message, /odd\.ko is not a kernel module/);
});

test("a missing folder is an error, not an empty list", async (t) => {
  const error = await t.throwsAsync(Effect.runPromise(resolveModules("/nonexistent/modules", ["a"])));
  t.regex(error.message, /\/nonexistent\/modules.*ENOENT/);
});

test("a gzip-packed module is unpacked, another packing refused with the way out", async (t) => {
  const folder = folderWith(t, { "a.ko.gz": gzipSync("content"), "b.ko.xz": "x", "c.ko.zst": "x" });
  const file = (name: string) => ({ name: name[0], path: join(folder, name) });
  t.is(Buffer.from(Effect.runSync(readModule(file("a.ko.gz"))).data).toString(), "content");
  const xz = await t.throwsAsync(Effect.runPromise(readModule(file("b.ko.xz"))));
  t.regex(xz.message, /b\.ko\.xz is packed with xz.*xz -dk/);
  const zst = await t.throwsAsync(Effect.runPromise(readModule(file("c.ko.zst"))));
  t.regex(zst.message, /zstd -dk/);
});

test("a module unpacked beside its packed file is taken", (t) => {
  const folder = folderWith(t, { "modules.dep": "a.ko.xz:\nb.ko.xz:\n", "a.ko": "plain" });
  t.deepEqual(
    resolve(folder, "a", "b").files.map((file) => file.path),
    [join(folder, "a.ko"), join(folder, "b.ko.xz")],
  );
});
