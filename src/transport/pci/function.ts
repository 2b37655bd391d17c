/** One function on the bus, as its root sees it. Sizes are 1, 2 or 4; offsets are multiples of their size. */
export interface PciFunction {
  readConfig(offset: number, size: number): number;
  writeConfig(offset: number, size: number, value: number): void;
  /** Where its BAR is now, or undefined while it does not answer there. */
  readonly barAddress: number | undefined;
  readonly barBytes: number;
  readBar(offset: number, size: number): number;
  writeBar(offset: number, size: number, value: number): void;
  /** The guest must look for further functions of this device. */
  setMultifunction(): void;
}
