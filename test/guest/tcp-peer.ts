/** Prints "ready", then for each connection at port argv[2] the SHA-256 of what came; sends the file argv[3] back first. */
import { createHash } from "node:crypto";
import * as fs from "node:fs";
import * as net from "node:net";

const [port, file] = process.argv.slice(2);
net
  .createServer({ allowHalfOpen: true }, (socket) => {
    const hash = createHash("sha256");
    socket.on("data", (bytes) => hash.update(bytes));
    socket.on("end", () => console.log(`received ${hash.digest("hex")}`));
    socket.on("error", () => undefined);
    fs.createReadStream(file, { highWaterMark: 1 << 20 }).pipe(socket);
  })
  .listen({ port: Number(port), host: "::" }, () => console.log("ready"));
