/** What the PCI transport needs from the machine that it is part of. A hypervisor implements it. */
export interface PciHost {
  /** A guest's write to this address, of any length, adds one to the eventfd; false: not possible (it exits). */
  watchKick(address: number, fd: number): boolean;
  unwatchKick(address: number, fd: number): void;
  /** A number for a message-signalled interrupt (a GSI). */
  claimRoute(): number;
  /** What the number's message is, as the guest wrote it into an MSI-X entry; false: it makes no message. */
  setRoute(gsi: number, address: number, data: number): boolean;
  /** Makes the eventfd raise the number's message, or stop doing so. */
  connectInterrupt(gsi: number, fd: number): void;
  disconnectInterrupt(gsi: number, fd: number): void;
}
