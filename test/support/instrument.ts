/**
 * Watches the loads of guest memory: a queue whose rings are made inside `watchLoads` reports each word that it
 * loads, and a test may change the word right after, as a hostile guest would between check and use.
 */

export type Watcher = (array: Uint16Array | Uint32Array, index: number) => void;

type Words = Uint16Array | Uint32Array;

/** What stands for a watched array, and the array. */
const watched = new WeakMap<object, Words>();

function watch<A extends Words>(array: A, onLoad: Watcher): A {
  const proxy = new Proxy(array, {
    get(target, key) {
      const value = Reflect.get(target, key, target);
      if (typeof key === "string" && /^\d+$/.test(key)) onLoad(target, Number(key));
      return value;
    },
    set: (target, key, value) => Reflect.set(target, key, value, target),
  });
  watched.set(proxy, array);
  return proxy;
}

/** Watches one array that somebody keeps in a list, such as a region's words. */
export function watchElement(list: Uint32Array[], at: number, onLoad: Watcher): void {
  list[at] = watch(list[at], onLoad);
}

/**
 * While `make` runs, arrays over existing memory are made watched. Atomics go on working on them, until
 * `restore` is called.
 */
export function watchLoads<A>(onLoad: Watcher, make: () => A): { made: A; restore: () => void } {
  const real = { Uint16Array, Uint32Array, load: Atomics.load, store: Atomics.store };
  const watching = (type: Uint16ArrayConstructor | Uint32ArrayConstructor) =>
    new Proxy(type, {
      construct: (target, [buffer, offset, length]) => {
        if (!(buffer instanceof ArrayBuffer)) return new target(buffer);
        return watch(new target(buffer, offset, length), onLoad);
      },
    });
  const restore = (): void => {
    Atomics.load = real.load;
    Atomics.store = real.store;
  };
  const load = (array: Words, index: number): number => {
    const value = real.load(watched.get(array) ?? array, index);
    const plain = watched.get(array);
    if (plain !== undefined) onLoad(plain, index);
    return value;
  };
  const store = (array: Words, index: number, value: number): number =>
    real.store(watched.get(array) ?? array, index, value);
  Object.assign(Atomics, { load, store });
  Object.assign(globalThis, {
    Uint16Array: watching(Uint16Array),
    Uint32Array: watching(Uint32Array),
  });
  try {
    return { made: make(), restore };
  } catch (error) {
    restore();
    throw error;
  } finally {
    Object.assign(globalThis, { Uint16Array: real.Uint16Array, Uint32Array: real.Uint32Array });
  }
}

/** Calls `between` before and after every Atomics access that `body` makes: where another CPU may come in. */
export function betweenAtomics(between: () => void, body: () => void): void {
  const real = { load: Atomics.load, store: Atomics.store };
  const around =
    (access: (...all: never[]) => unknown) =>
    (...all: never[]): unknown => {
      between();
      const result = access(...all);
      between();
      return result;
    };
  Object.assign(Atomics, {
    load: around(real.load as (...all: never[]) => unknown),
    store: around(real.store as (...all: never[]) => unknown),
  });
  try {
    body();
  } finally {
    Object.assign(Atomics, real);
  }
}
