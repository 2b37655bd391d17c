/** Every way out of the default guest leaves the terminal as it was. */
import * as fs from "node:fs/promises";
import { assertLeft, bootGuest, bootTimeoutMs, openShell, terminalPrograms } from "./default-terminal.ts";
import { guestTest } from "./launcher.ts";

const test = await guestTest(...terminalPrograms);

test("the terminal is as it was after a power-off, after SIGTERM and after SIGKILL", async (t) => {
  t.timeout(3 * bootTimeoutMs + 120_000);
  const { terminal, folder } = await openShell(t);
  await bootGuest(terminal);
  await terminal.type("exit");
  await terminal.press("Enter");
  await assertLeft(t, terminal, folder, 0);

  for (const [signal, status] of [
    ["SIGTERM", 143],
    ["SIGKILL", 137],
  ] as const) {
    await bootGuest(terminal);
    const children = await fs.readFile(`/proc/${terminal.panePid}/task/${terminal.panePid}/children`, "utf8");
    process.kill(Number(children.trim()), signal);
    await assertLeft(t, terminal, folder, status);
  }
});
