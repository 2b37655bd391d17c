/**
 * A virtio device on the PCI bus, without legacy (Virtual I/O Device 1.2, 4.1): its registers stand in one memory BAR,
 * a page for each kind, and its queues work by themselves: a kick is an ioeventfd, an interrupt an MSI-X message.
 *
 * The guest may write anything anywhere in any order. What makes no sense is ignored, or stops this device.
 */
import * as Effect from "effect/Effect";
import * as Semaphore from "effect/Semaphore";
import type { EventLoop } from "../../loop/event-loop.ts";
import type { GuestMemory } from "../../memory/guest-memory.ts";

import { DEVICE_ID, isRemote, type RemoteDevice, type VirtioDevice } from "../../virtio/device.ts";
import { F_NOTIFY_ON_EMPTY, F_VERSION_1, has, listBits, QUEUE_FEATURES } from "../../virtio/features.ts";
import type { QueueCounters } from "../../virtio/queue-runner.ts";
import { COMMAND_MEMORY, CONFIG, ConfigSpace } from "./config-space.ts";
import type { PciFunction } from "./function.ts";
import type { PciHost } from "./host.ts";
import { MSIX_ENABLE, MSIX_ENTRY_BYTES, MSIX_FUNCTION_MASK, Msix } from "./msix.ts";
import { PciQueue } from "./queue.ts";

/** The BAR: pages of 4 KiB, one for each structure. */
const PAGE = 0x1000;
const COMMON = 0;
const ISR = PAGE;
const DEVICE = 2 * PAGE;
const NOTIFY = 3 * PAGE;
const MSIX_TABLE = 4 * PAGE;
const MSIX_PENDING = 5 * PAGE;
export const BAR_BYTES = 8 * PAGE;
/** Bytes between the notification addresses of two queues. */
const NOTIFY_MULTIPLIER = 4;
/** What a page of MSI-X entries holds, one of which is for configuration changes. */
const QUEUES_MAX = PAGE / MSIX_ENTRY_BYTES - 1;

/** struct virtio_pci_common_cfg (4.1.4.3). */
const REG = {
  DEVICE_FEATURE_SELECT: 0,
  DEVICE_FEATURE: 4,
  DRIVER_FEATURE_SELECT: 8,
  DRIVER_FEATURE: 12,
  CONFIG_VECTOR: 16,
  NUM_QUEUES: 18,
  STATUS: 20,
  CONFIG_GENERATION: 21,
  QUEUE_SELECT: 22,
  QUEUE_SIZE: 24,
  QUEUE_VECTOR: 26,
  QUEUE_ENABLE: 28,
  QUEUE_NOTIFY_OFF: 30,
  QUEUE_ADDRESSES: 32,
  QUEUE_ADDRESSES_END: 56,
} as const;

/** Device status bits (2.1). */
const STATUS_DRIVER_OK = 4;
const STATUS_FEATURES_OK = 8;
const STATUS_NEEDS_RESET = 64;

const ISR_QUEUE = 1;
const ISR_CONFIG = 2;
const NO_VECTOR = 0xffff;

/** Capability ids of PCI, and types of virtio's own (4.1.4). */
const CAP_VENDOR = 0x09;
const CAP_MSIX = 0x11;
const CFG = { COMMON: 1, NOTIFY: 2, ISR: 3, DEVICE: 4, PCI: 5 } as const;

/** PCI's class of each kind of device; 0xff00 is "other". */
const CLASS: Readonly<Record<number, number>> = {
  [DEVICE_ID.NET]: 0x020000,
  [DEVICE_ID.BLOCK]: 0x010000,
  [DEVICE_ID.CONSOLE]: 0x078000,
};

export interface VirtioPciOptions {
  readonly loop: EventLoop;
  readonly host: PciHost;
  readonly memory: GuestMemory;
  readonly device: VirtioDevice | RemoteDevice;
  /** One for each queue that this process serves. */
  readonly counters: readonly QueueCounters[];
  /** Where its BAR stands until the guest moves it. */
  readonly barAddress: number;
  readonly report: (line: string) => void;
  readonly trace: ((line: string) => void) | undefined;
}

export class VirtioPci implements PciFunction {
  readonly barBytes = BAR_BYTES;
  readonly #options: VirtioPciOptions;
  readonly #device: VirtioDevice | RemoteDevice;
  readonly #config: ConfigSpace;
  readonly #msix: Msix;
  readonly #queues: PciQueue[];
  readonly #msixCapability: number;
  readonly #pciCapability: number;
  readonly #stopping = Semaphore.makeUnsafe(1);

  #status = 0;
  #resetting = false;
  #isr = 0;
  #generation = 0;
  #configVector = NO_VECTOR;
  #deviceFeatureSelect = 0;
  #driverFeatureSelect = 0;
  #driverFeatures = 0n;
  #queueSelect = 0;

  constructor(options: VirtioPciOptions) {
    const { device, host, loop, memory, counters } = options;
    if (device.queueCount > QUEUES_MAX)
      throw new Error(`${device.name}: ${device.queueCount} queues are too many`);
    this.#options = options;
    this.#device = device;
    this.#config = new ConfigSpace({
      vendor: 0x1af4,
      device: 0x1040 + device.id,
      classCode: CLASS[device.id] ?? 0xff0000,
      revision: 1,
    });
    this.#msix = new Msix(host, device.queueCount + 1);
    const msix = this.#msix;
    this.#queues = Array.from(
      { length: device.queueCount },
      (_, index) =>
        new PciQueue(
          { loop, host, msix, memory, device, index, counter: counters[index] },
          this.#raiseQueue,
          this.#onFault,
        ),
    );
    const { view } = this.#config;
    view.setUint16(CONFIG.SUBSYSTEM_VENDOR, 0x1af4, true);
    view.setUint16(CONFIG.SUBSYSTEM, 0x1100, true);
    view.setUint32(CONFIG.BAR0, options.barAddress, true);
    this.#config.allowWrites(CONFIG.BAR0, 4, ~(BAR_BYTES - 1) >>> 0);
    this.#addCapabilities();
    this.#pciCapability = this.#addVirtioCapability(CFG.PCI, 0, 0, 4);
    this.#msixCapability = this.#addMsixCapability();
    device.onConfigChange = this.#onConfigChange;
    if (isRemote(device)) device.onGone = (message) => this.#break(message, "until the guest reboots");
  }

  #addCapabilities(): void {
    this.#addVirtioCapability(CFG.COMMON, COMMON, REG.QUEUE_ADDRESSES_END, 0);
    this.#addVirtioCapability(
      CFG.NOTIFY,
      NOTIFY,
      this.#queues.length * NOTIFY_MULTIPLIER,
      4,
      NOTIFY_MULTIPLIER,
    );
    this.#addVirtioCapability(CFG.ISR, ISR, 1, 0);
    this.#addVirtioCapability(CFG.DEVICE, DEVICE, PAGE, 0);
  }

  /** struct virtio_pci_cap (4.1.4) behind its id and link, with `more` bytes of which the first four may be set. */
  #addVirtioCapability(type: number, offset: number, length: number, more: number, extra = 0): number {
    const body = new DataView(new ArrayBuffer(14 + more));
    body.setUint8(0, 16 + more);
    body.setUint8(1, type);
    body.setUint32(6, offset, true);
    body.setUint32(10, length, true);
    if (more > 0) body.setUint32(14, extra, true);
    const at = this.#config.addCapability(CAP_VENDOR, new Uint8Array(body.buffer));
    if (type === CFG.PCI) {
      this.#config.allowWrites(at + 4, 1, 0xff);
      this.#config.allowWrites(at + 8, 4, 0xffffffff);
      this.#config.allowWrites(at + 12, 4, 0xffffffff);
    }
    return at;
  }

  #addMsixCapability(): number {
    const body = new DataView(new ArrayBuffer(10));
    body.setUint16(0, this.#msix.count - 1, true);
    body.setUint32(2, MSIX_TABLE, true);
    body.setUint32(6, MSIX_PENDING, true);
    const at = this.#config.addCapability(CAP_MSIX, new Uint8Array(body.buffer));
    this.#config.allowWrites(at + 2, 2, MSIX_ENABLE | MSIX_FUNCTION_MASK);
    return at;
  }

  // ---- configuration space ----

  get barAddress(): number | undefined {
    const { view } = this.#config;
    if ((view.getUint16(CONFIG.COMMAND, true) & COMMAND_MEMORY) === 0) return undefined;
    return view.getUint32(CONFIG.BAR0, true);
  }

  setMultifunction(): void {
    this.#config.setMultifunction();
  }

  readConfig(offset: number, size: number): number {
    const window = this.#pciCapability + 16;
    if (offset >= window && offset < window + 4) return this.#throughWindow(undefined);
    return this.#config.read(offset, size);
  }

  writeConfig(offset: number, size: number, value: number): void {
    const window = this.#pciCapability + 16;
    if (offset >= window && offset < window + 4) {
      this.#throughWindow(value);
      return;
    }
    const before = this.barAddress;
    this.#config.write(offset, size, value);
    const { view } = this.#config;
    const control = this.#msixCapability + 2;
    if (offset < control + 2 && offset + size > control) this.#msix.setControl(view.getUint16(control, true));
    if (this.barAddress !== before)
      for (const queue of this.#queues) queue.watchKicksAt(this.#kickAddress(queue));
  }

  #kickAddress(queue: PciQueue): number | undefined {
    const bar = this.barAddress;
    return bar === undefined ? undefined : bar + NOTIFY + queue.index * NOTIFY_MULTIPLIER;
  }

  /** The window into the BAR that stands in the configuration space (4.1.4.9); reads where no value is given. */
  #throughWindow(value: number | undefined): number {
    const { view } = this.#config;
    const at = this.#pciCapability;
    const offset = view.getUint32(at + 8, true);
    const size = view.getUint32(at + 12, true);
    const isValid = view.getUint8(at + 4) === 0 && (size === 1 || size === 2 || size === 4);
    if (!isValid || offset % size !== 0 || offset + size > BAR_BYTES) return 0;
    if (value === undefined) return this.readBar(offset, size);
    this.writeBar(offset, size, value);
    return 0;
  }

  // ---- the BAR ----

  readBar(offset: number, size: number): number {
    if (offset % size !== 0) return 0;
    const inPage = offset % PAGE;
    switch (offset - inPage) {
      case COMMON:
        return this.#readCommon(inPage, size);
      case ISR:
        return inPage === 0 && size === 1 ? this.#takeIsr() : 0;
      case DEVICE:
        return this.#readDeviceConfig(inPage, size);
      case MSIX_TABLE:
        return size === 4 ? this.#msix.readTable(inPage) : 0;
      case MSIX_PENDING:
        return size === 4 ? this.#msix.readPending(inPage) : 0;
      default:
        return 0;
    }
  }

  writeBar(offset: number, size: number, value: number): void {
    if (offset % size !== 0) return;
    const inPage = offset % PAGE;
    switch (offset - inPage) {
      case COMMON:
        this.#writeCommon(inPage, size, value >>> 0);
        break;
      case DEVICE:
        this.#writeDeviceConfig(inPage, size, value);
        break;
      case NOTIFY:
        // Usually the kernel takes it; here it comes where that was not possible.
        this.#queues[Math.floor(inPage / NOTIFY_MULTIPLIER)]?.kick();
        break;
      case MSIX_TABLE:
        if (size === 4) this.#msix.writeTable(inPage, value >>> 0);
        break;
    }
  }

  #takeIsr(): number {
    const isr = this.#isr;
    this.#isr = 0;
    return isr;
  }

  #readDeviceConfig(offset: number, size: number): number {
    const bytes = this.#device.config();
    let value = 0;
    for (let i = 0; i < size; i++) value += (bytes[offset + i] ?? 0) * 2 ** (8 * i);
    return value;
  }

  #writeDeviceConfig(offset: number, size: number, value: number): void {
    const bytes = Uint8Array.from({ length: size }, (_, i) => (value >>> (8 * i)) & 0xff);
    this.#device.writeConfig(offset, bytes);
  }

  // ---- common configuration ----

  get #offered(): bigint {
    if (isRemote(this.#device)) return this.#device.features;
    // The transport is not the legacy one, and neither is what it offers.
    return this.#device.features | (QUEUE_FEATURES & ~F_NOTIFY_ON_EMPTY);
  }

  #readCommon(offset: number, size: number): number {
    const queue: PciQueue | undefined = this.#queues[this.#queueSelect];
    if (offset >= REG.QUEUE_ADDRESSES && offset < REG.QUEUE_ADDRESSES_END) {
      return size === 4 ? (queue?.addressWord((offset - REG.QUEUE_ADDRESSES) / 4) ?? 0) : 0;
    }
    if (size !== registerSize(offset)) return 0;
    switch (offset) {
      case REG.DEVICE_FEATURE_SELECT:
        return this.#deviceFeatureSelect;
      case REG.DEVICE_FEATURE:
        return featureWord(this.#offered, this.#deviceFeatureSelect);
      case REG.DRIVER_FEATURE_SELECT:
        return this.#driverFeatureSelect;
      case REG.DRIVER_FEATURE:
        return featureWord(this.#driverFeatures, this.#driverFeatureSelect);
      case REG.CONFIG_VECTOR:
        return this.#configVector;
      case REG.NUM_QUEUES:
        return this.#queues.length;
      case REG.STATUS:
        return this.#status;
      case REG.CONFIG_GENERATION:
        return this.#generation;
      case REG.QUEUE_SELECT:
        return this.#queueSelect;
      case REG.QUEUE_SIZE:
        return queue?.size ?? 0;
      case REG.QUEUE_VECTOR:
        return queue?.vector ?? NO_VECTOR;
      case REG.QUEUE_ENABLE:
        return queue?.enabled ? 1 : 0;
      case REG.QUEUE_NOTIFY_OFF:
        return queue?.index ?? 0;
      default:
        return 0;
    }
  }

  #writeCommon(offset: number, size: number, value: number): void {
    // Until a reset has ended the device has no state that could be changed.
    if (this.#resetting) return;
    const queue: PciQueue | undefined = this.#queues[this.#queueSelect];
    if (offset >= REG.QUEUE_ADDRESSES && offset < REG.QUEUE_ADDRESSES_END) {
      if (size === 4) queue?.setAddressWord((offset - REG.QUEUE_ADDRESSES) / 4, value);
      return;
    }
    if (size !== registerSize(offset)) return;
    switch (offset) {
      case REG.DEVICE_FEATURE_SELECT:
        this.#deviceFeatureSelect = value;
        break;
      case REG.DRIVER_FEATURE_SELECT:
        this.#driverFeatureSelect = value;
        break;
      case REG.DRIVER_FEATURE:
        this.#acceptFeatures(value);
        break;
      case REG.CONFIG_VECTOR:
        this.#configVector = this.#validVector(value);
        break;
      case REG.STATUS:
        this.#setStatus(value);
        break;
      case REG.QUEUE_SELECT:
        this.#queueSelect = value;
        break;
      case REG.QUEUE_SIZE:
        queue?.setSize(value);
        break;
      case REG.QUEUE_VECTOR:
        if (queue !== undefined) queue.vector = this.#validVector(value);
        break;
      case REG.QUEUE_ENABLE:
        if (value === 1) this.#enableQueue(queue);
        break;
    }
  }

  /** The device answers with "none" where it has no such vector (4.1.5.1.2.1). */
  #validVector(vector: number): number {
    return vector < this.#msix.count ? vector : NO_VECTOR;
  }

  #acceptFeatures(word: number): void {
    const select = this.#driverFeatureSelect;
    if (select > 1 || (this.#status & STATUS_FEATURES_OK) !== 0) return;
    const shift = BigInt(32 * select);
    this.#driverFeatures = (this.#driverFeatures & ~(0xffffffffn << shift)) | (BigInt(word) << shift);
  }

  #setStatus(value: number): void {
    if (value === 0) {
      this.#reset();
      return;
    }
    // The driver clears no bit but by a reset (2.1.1).
    let status = this.#status | value;
    if ((value & STATUS_FEATURES_OK) !== 0 && !this.#areFeaturesGood()) status &= ~STATUS_FEATURES_OK;
    const starts = (status & STATUS_DRIVER_OK) !== 0 && (this.#status & STATUS_DRIVER_OK) === 0;
    this.#status = status & 0xff;
    if (!starts) return;
    // Nobody has looked at these features: no queue works by them (3.1.1, steps 5 and 6).
    if ((status & STATUS_FEATURES_OK) === 0) {
      this.#break(`${this.#device.name}: DRIVER_OK without FEATURES_OK`);
      return;
    }
    this.#options.trace?.(`${this.#device.name}: the driver accepted ${listBits(this.#driverFeatures)}`);
    for (const queue of this.#queues) if (queue.enabled) this.#startQueue(queue);
  }

  #areFeaturesGood(): boolean {
    const foreign = this.#driverFeatures & ~this.#offered;
    if (foreign === 0n && has(this.#driverFeatures, F_VERSION_1)) return true;
    const what = foreign === 0n ? "without VERSION_1" : `${listBits(foreign)}, never offered`;
    this.#options.trace?.(`${this.#device.name}: the driver's features are refused: ${what}`);
    return false;
  }

  #enableQueue(queue: PciQueue | undefined): void {
    if (queue === undefined || queue.enabled) return;
    queue.enabled = true;
    if ((this.#status & STATUS_DRIVER_OK) !== 0) this.#startQueue(queue);
  }

  #startQueue(queue: PciQueue): void {
    if ((this.#status & STATUS_NEEDS_RESET) !== 0) return;
    const problem = queue.start(this.#driverFeatures, this.#kickAddress(queue));
    if (problem !== undefined) this.#break(problem);
  }

  readonly #raiseQueue = (queue: PciQueue): void => {
    this.#isr |= ISR_QUEUE;
    this.#msix.raise(queue.vector);
  };

  readonly #onConfigChange = (): void => {
    this.#generation = (this.#generation + 1) & 0xff;
    if ((this.#status & STATUS_DRIVER_OK) === 0) return;
    this.#isr |= ISR_CONFIG;
    this.#msix.raise(this.#configVector);
  };

  readonly #onFault = (message: string): void => this.#break(message);

  /** The guest broke a rule, and the device stops until it is reset (2.1.2); or who serves it is gone. */
  #break(message: string, until = "until the guest resets it"): void {
    if ((this.#status & STATUS_NEEDS_RESET) !== 0) return;
    this.#options.report(`${message}; ${this.#device.name} is stopped ${until}`);
    this.#status |= STATUS_NEEDS_RESET;
    this.#onConfigChange();
    this.#run(this.#stopQueues);
  }

  #reset(): void {
    if (this.#status === 0 && !this.#queues.some((queue) => queue.isStarted)) {
      this.#forget();
      return;
    }
    this.#resetting = true;
    this.#run(
      this.#stopQueues.pipe(
        Effect.andThen(
          Effect.sync(() => {
            this.#forget();
            this.#resetting = false;
          }),
        ),
      ),
    );
  }

  #forget(): void {
    this.#status = 0;
    this.#isr = 0;
    this.#driverFeatures = 0n;
    this.#configVector = NO_VECTOR;
    this.#queueSelect = 0;
    for (const queue of this.#queues) queue.forget();
  }

  #run(effect: Effect.Effect<void>): void {
    Effect.runFork(effect, { scheduler: this.#options.loop.scheduler });
  }

  /** Two may want them stopped at a time: a fault, and a reset or the end. */
  readonly #stopQueues: Effect.Effect<void> = Effect.suspend(() =>
    Effect.uninterruptible(
      this.#stopping.withPermit(Effect.forEach(this.#queues, (queue) => queue.stop, { discard: true })),
    ),
  );

  /** Stops the device and gives back what it holds; the machine it was part of is gone. */
  readonly close: Effect.Effect<void> = Effect.suspend(() => {
    this.#device.onConfigChange = undefined;
    if (isRemote(this.#device)) this.#device.onGone = undefined;
    return this.#stopQueues.pipe(
      Effect.andThen(
        Effect.sync(() => {
          this.#msix.close();
          for (const queue of this.#queues) queue.close();
        }),
      ),
    );
  });
}

/** The size of the register that begins at this offset, or 0. */
function registerSize(offset: number): number {
  if (offset < REG.CONFIG_VECTOR) return offset % 4 === 0 ? 4 : 0;
  if (offset === REG.STATUS || offset === REG.CONFIG_GENERATION) return 1;
  return offset % 2 === 0 ? 2 : 0;
}

const featureWord = (features: bigint, select: number): number =>
  select > 1 ? 0 : Number((features >> BigInt(32 * select)) & 0xffffffffn);
