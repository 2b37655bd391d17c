// Runs the bundle as scripts/loader.cjs does, without a cache, and at its exit writes one of the functions that it
// needed: node scripts/code-cache.cjs <dist> <loopguest's arguments>
"use strict";
const { readFileSync, writeFileSync } = require("node:fs");
const { createRequire } = require("node:module");
const { Script } = require("node:vm");

const [dist] = process.argv.splice(2, 1);
const filename = `${dist}/loopguest.main.js`;
const script = new Script(readFileSync(filename, "latin1"), { filename });
process.on("exit", () => writeFileSync(`${dist}/loopguest.cache`, script.createCachedData()));
script.runInThisContext()(exports, createRequire(filename), module, filename, dist);
