#!/usr/bin/env node
// dist/loopguest.js: runs the bundle beside it with the code that V8 compiled when it was built. Another Node has
// another V8, which rejects that code and compiles the source: slower by some ten milliseconds, and nothing else.
"use strict";
const { readFileSync } = require("node:fs");
const { Script } = require("node:vm");

function readCache() {
  try {
    return readFileSync(`${__dirname}/loopguest.cache`);
  } catch {
    return undefined;
  }
}

const filename = `${__dirname}/loopguest.main.js`;
const cachedData = readCache();
// One function expression, all ASCII: scripts/build.mjs makes it so.
const script = new Script(readFileSync(filename, "latin1"), { filename, ...(cachedData && { cachedData }) });
script.runInThisContext()(exports, require, module, filename, __dirname);
