/** What every source of a guest's CPU (uml, kvm, lguest) has in common. */

/** How a guest ended. */
export type GuestExit =
  /** Its own way out. */
  | { readonly kind: "power-off" }
  /** Its kernel gave up; `message` is the kernel's line, `lastWords` are the lines around it. */
  | { readonly kind: "panic"; readonly message: string; readonly lastWords: ReadonlyArray<string> }
  /** It broke a rule of the machine, or said why it gave up; `message` tells. */
  | { readonly kind: "died"; readonly message: string }
  /** Something ended it: we (`SIGKILL`), somebody else, or the host's kernel. */
  | { readonly kind: "killed"; readonly signal: string; readonly lastWords: ReadonlyArray<string> }
  /** It did not get as far as a shell or a command; `message` is one line that says why. */
  | { readonly kind: "failed-to-start"; readonly message: string; readonly lastWords: ReadonlyArray<string> }
  /** Its processor can run no more (a triple fault, say); `message` says which, why and where. */
  | { readonly kind: "cpu-stopped"; readonly message: string; readonly lastWords: ReadonlyArray<string> };
