import test from "ava";
import fc from "fast-check";
import { Iovecs } from "../../src/device/iovecs.ts";
import { StreamLane } from "../../src/device/stream-lane.ts";
import { check, ERRNO, native } from "../../src/native.ts";
import { allocateBlock } from "../support/test-loop.ts";

const NO_FDS = new Int32Array(0);

/** A lane, the other end of its socket, and memory for one frame with its header, in several pieces. */
function setScene() {
  const fds = new Int32Array(2);
  check(native.socketPair(fds), "socketpair");
  for (const fd of fds) native.setNonBlocking(fd);
  const lane = new StreamLane(fds[0]);
  const block = allocateBlock(1 << 17);
  const iovecs = new Iovecs(3);
  [7, 100, block.bytes.length - 107].reduce((at, length, i) => {
    iovecs.set(i, block.address + at, length);
    return at + length;
  }, 0);
  const close = (): void => {
    for (const fd of fds) native.close(fd);
    iovecs.free();
    block.free();
  };
  return { lane, peer: fds[1], block, iovecs, close };
}

function framed(frame: Uint8Array): Buffer {
  const length = Buffer.alloc(4);
  length.writeUInt32BE(frame.length);
  return Buffer.concat([length, frame]);
}

function sendAll(fd: number, bytes: Uint8Array): void {
  check(native.send(fd, bytes, 0, bytes.length, NO_FDS), "send");
}

/** What the other end can read now. */
function drain(fd: number): Buffer {
  const bytes = new Uint8Array(1 << 20);
  const got = native.receive(fd, bytes, 0, bytes.length, new Int32Array(33));
  return Buffer.from(bytes.subarray(0, Math.max(0, got)));
}

test("frames arrive one by one behind an empty header, however the stream is cut", (t) => {
  const frames = fc.array(fc.uint8Array({ minLength: 1, maxLength: 300 }), { minLength: 1, maxLength: 6 });
  fc.assert(
    fc.property(frames, fc.array(fc.integer({ min: 1, max: 400 }), { maxLength: 8 }), (sent, cuts) => {
      const { lane, peer, block, iovecs, close } = setScene();
      const stream = Buffer.concat(sent.map(framed));
      const seen: Buffer[] = [];
      const receive = (): void => {
        for (;;) {
          block.bytes.fill(0xee, 0, 1000);
          const got = lane.receive(iovecs.at(0), 3);
          if (got === -ERRNO.EAGAIN) return;
          t.true(block.bytes.subarray(0, 12).every((byte) => byte === 0));
          seen.push(Buffer.from(block.bytes.slice(12, got)));
        }
      };
      let at = 0;
      for (const cut of [...cuts, stream.length]) {
        const piece = stream.subarray(at, at + cut);
        at += piece.length;
        if (piece.length > 0) sendAll(peer, piece);
        receive();
      }
      t.deepEqual(
        seen,
        sent.map((frame) => Buffer.from(frame)),
      );
      close();
    }),
    { numRuns: 100 },
  );
});

test("poll tells of every frame that was not read yet", (t) => {
  const { lane, peer, iovecs, close } = setScene();
  sendAll(peer, Buffer.concat([framed(new Uint8Array(60)), framed(new Uint8Array(70))]));
  t.is(lane.receive(iovecs.at(0), 3), 72);
  // The second frame's bytes are still in the socket.
  t.is(drain(lane.fd).length, 70);
  close();
});

test("frames are sent with their length in front and without their header", (t) => {
  const { lane, peer, block, iovecs, close } = setScene();
  const one = new Iovecs(2);
  block.bytes.set(Uint8Array.from({ length: 200 }, (_, i) => i));
  one.set(0, block.address, 30);
  one.set(1, block.address + 30, 50);
  t.is(lane.transmit(one.at(0), 2), 80);
  t.deepEqual(drain(peer), framed(block.bytes.subarray(12, 80)));
  lane.headerBytes = 10;
  t.is(lane.transmit(one.at(0), 2), 80);
  t.deepEqual(drain(peer), framed(block.bytes.subarray(10, 80)));
  one.free();
  t.is(iovecs.capacity, 3);
  close();
});

test("a full stream takes no frame, or the whole of it, and the order stays", (t) => {
  const { lane, peer, block, close } = setScene();
  const one = new Iovecs(1);
  const length = 32_012;
  one.set(0, block.address, length);
  const sent: number[] = [];
  const read: Buffer[] = [];
  for (let n = 1; sent.length < 60; ) {
    block.bytes.fill(n, 0, length);
    const result = lane.transmit(one.at(0), 1);
    if (result === -ERRNO.EAGAIN) {
      read.push(drain(peer));
      continue;
    }
    t.is(result, length);
    sent.push(n++);
  }
  read.push(drain(peer));
  t.deepEqual(
    Buffer.concat(read),
    Buffer.concat(sent.map((n) => framed(new Uint8Array(length - 12).fill(n)))),
  );
  one.free();
  close();
});

test("a length that no frame has, and an end, are errors; what is read before the end is not lost", (t) => {
  for (const bad of [0, 65_558, 0xffff_ffff]) {
    const { lane, peer, iovecs, close } = setScene();
    const length = Buffer.alloc(4);
    length.writeUInt32BE(bad);
    sendAll(peer, length);
    t.is(lane.receive(iovecs.at(0), 3), -ERRNO.EPROTO);
    close();
  }
  const { lane, peer, iovecs, close } = setScene();
  sendAll(peer, framed(new Uint8Array(60)));
  native.close(peer);
  t.is(lane.receive(iovecs.at(0), 3), 72);
  t.is(lane.receive(iovecs.at(0), 3), 0);
  t.is(lane.transmit(iovecs.at(0), 1), -ERRNO.EPIPE);
  close();
});
