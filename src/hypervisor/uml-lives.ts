/**
 * The lives of a User-Mode Linux guest, and whether one that broke off is to be begun again.
 *
 * UML reboots by executing itself, with signals of the old kernel still under way; now and then the old kernel dies of
 * one on its last steps, or the new one before it is ready for any (about 1 of 40 boots on a loaded machine). That is
 * no end which the guest has asked for: it asked for a reboot, or has not even begun. The sign is that no device of
 * it had a connection in that life: a kernel connects to each before its first process runs.
 */

/** What every kernel writes, even a quiet one, when it reboots (kernel/reboot.c). */
const RESTARTING = /^(\[ *[\d.]+\] )?reboot: Restarting system/;
const PANIC = /Kernel panic - not syncing: /;

/** Lives that may break off one after the other before the guest is given up. */
export const BROKEN_LIVES_MAX = 5;

export class Lives {
  readonly #connections: (() => number) | undefined;
  /** Connections when this life began. */
  #before: number;
  #isReboot = false;
  #panicked = false;
  #broken = 0;

  /**
   * @param connections how many connections the guest's devices have had; without it nothing shows how far a life
   *   came, and none is begun again
   */
  constructor(connections: (() => number) | undefined) {
    this.#connections = connections;
    this.#before = connections?.() ?? 0;
  }

  /** A line of the kernel's console; from "Restarting system" on it is the next life. */
  onLine(line: string): void {
    if (RESTARTING.test(line)) this.#begin(true);
    else if (PANIC.test(line)) this.#panicked = true;
  }

  /** The guest was ended by a signal that nobody sent on purpose: whether to begin again, which then begins. */
  mayBeginAgain(): boolean {
    if (this.#connections === undefined || this.#wasLived) return false;
    // A kernel that panics on its way down has done what the guest wanted; at a first start the panic is its own.
    if (this.#panicked && !this.#isReboot) return false;
    if (this.#broken === BROKEN_LIVES_MAX) return false;
    this.#broken++;
    this.#begin(this.#isReboot);
    return true;
  }

  get #wasLived(): boolean {
    return this.#connections !== undefined && this.#connections() > this.#before;
  }

  #begin(isReboot: boolean): void {
    if (this.#wasLived) this.#broken = 0;
    this.#before = this.#connections?.() ?? 0;
    this.#isReboot = isReboot;
    this.#panicked = false;
  }
}
