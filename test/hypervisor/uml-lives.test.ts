import test from "ava";
import { BROKEN_LIVES_MAX, Lives } from "../../src/hypervisor/uml-lives.ts";

const RESTART = "reboot: Restarting system";
const PANIC = "Kernel panic - not syncing: Attempted to kill init!";

/** Lives of a guest whose devices have had `connections.n` connections. */
function make() {
  const connections = { n: 0 };
  return { lives: new Lives(() => connections.n), connections };
}

test("a start that breaks off before the first connection is begun again, five times in a row", (t) => {
  const { lives } = make();
  for (let n = 0; n < BROKEN_LIVES_MAX; n++) t.true(lives.mayBeginAgain());
  t.false(lives.mayBeginAgain());
});

test("a guest that has begun is not", (t) => {
  const { lives, connections } = make();
  connections.n = 1;
  t.false(lives.mayBeginAgain());
});

test("a panic of the guest's own is its end", (t) => {
  const { lives } = make();
  lives.onLine(PANIC);
  t.false(lives.mayBeginAgain());
});

test("a kernel that dies on its last steps before a reboot is begun again, whatever it says", (t) => {
  for (const words of [
    [RESTART],
    [RESTART, "", PANIC],
    ["[   12.345678] reboot: Restarting system", PANIC],
  ]) {
    const { lives, connections } = make();
    connections.n = 3;
    for (const line of words) lives.onLine(line);
    t.true(lives.mayBeginAgain(), words.join());
    // And so is the next, until one has come to its devices.
    t.true(lives.mayBeginAgain());
    connections.n = 6;
    t.false(lives.mayBeginAgain());
  }
});

test("a panic after a reboot, when the devices are there, is the guest's end", (t) => {
  const { lives, connections } = make();
  connections.n = 3;
  lives.onLine(RESTART);
  connections.n = 6;
  lives.onLine(PANIC);
  t.false(lives.mayBeginAgain());
});

test("a life that got to its devices makes up for those before it", (t) => {
  const { lives, connections } = make();
  for (let boots = 0; boots < 20; boots++) {
    for (let n = 0; n < BROKEN_LIVES_MAX; n++) t.true(lives.mayBeginAgain());
    connections.n += 3;
    lives.onLine(RESTART);
  }
});

test("without devices nothing tells how far a life came", (t) => {
  t.false(new Lives(undefined).mayBeginAgain());
});
