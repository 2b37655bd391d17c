/** The control queue of a network card (section 5.1.6.5): what Linux asks for; all else is answered with an error. */
import { DescriptorChain } from "../virtio/chain.ts";
import type { QueuePort, QueueService } from "../virtio/device.ts";
import { CTRL, CTRL_ACK, CTRL_MAC, CTRL_MQ_VQ_PAIRS_SET, CTRL_RX_NOBCAST } from "./net-format.ts";

/** What a command can change. */
export interface ControlTarget {
  /** False: the card has not so many queue pairs. */
  setPairs(pairs: number): boolean;
  setMac(mac: Uint8Array): void;
}

/** A MAC table of some hundred addresses; a longer one is read as far as it is looked at. */
const COMMAND_BYTES_MAX = 4096;
const MAC_BYTES = 6;

export class ControlService implements QueueService {
  readonly #port: QueuePort;
  readonly #target: ControlTarget;
  readonly #trace: ((line: string) => void) | undefined;
  readonly #chain: DescriptorChain;
  readonly #command = new Uint8Array(COMMAND_BYTES_MAX);

  constructor(port: QueuePort, target: ControlTarget, trace: ((line: string) => void) | undefined) {
    this.#port = port;
    this.#target = target;
    this.#trace = trace;
    this.#chain = new DescriptorChain(port.segmentsMax);
  }

  serve(limit: number): number {
    const chain = this.#chain;
    let served = 0;
    while (served < limit && this.#port.take(chain)) {
      served++;
      const length = chain.copyOut(0, chain.readable, 0, this.#command);
      const command = this.#command.subarray(0, length);
      const ack = length >= 2 && this.#obey(command) ? CTRL_ACK.OK : CTRL_ACK.ERR;
      this.#trace?.(
        `${this.#port.name}: class ${command[0]}, command ${command[1]}: ${ack === 0 ? "ok" : "error"}`,
      );
      const written = chain.copyIn(0, Uint8Array.of(ack));
      if (written === 0) this.#port.fail(`control command of head ${chain.head} has no byte for its answer`);
      this.#port.complete(chain.head, written);
    }
    return served;
  }

  /** Whether the command is known and was done. */
  #obey(command: Uint8Array): boolean {
    const [kind, what] = command;
    const data = command.subarray(2);
    switch (kind) {
      case CTRL.RX:
        // Nothing is filtered here, so that every mode is served: filtering is best effort (5.1.6.5.1).
        return what <= CTRL_RX_NOBCAST && data.length >= 1;
      case CTRL.MAC:
        if (what === CTRL_MAC.TABLE_SET) return data.length >= 8;
        if (what !== CTRL_MAC.ADDR_SET || data.length !== MAC_BYTES) return false;
        this.#target.setMac(data.slice());
        return true;
      case CTRL.MQ:
        if (what !== CTRL_MQ_VQ_PAIRS_SET || data.length < 2) return false;
        return this.#target.setPairs(data[0] | (data[1] << 8));
      default:
        return false;
    }
  }

  stop(): void {}
  release(): void {}
}
