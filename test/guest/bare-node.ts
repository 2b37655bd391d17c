/**
 * A process that does nothing, started as the launcher is: for how many threads Node has by itself. It reads a
 * file without waiting for it, because libuv starts its threads at the first such request.
 */
import * as fs from "node:fs/promises";

await fs.readFile("/proc/self/stat");
setInterval(() => undefined, 1_000_000);
console.log("ready");
