/** Where the small programs are that native-shim builds besides the addon. */
import { artefactPath } from "../native.ts";

/**
 * The first process of the default guest (native-shim/guest-init.c), a static executable.
 *
 * @throws Error when native-shim is not built
 */
export const guestInitPath = (): string => artefactPath("guest-init");

/**
 * The parent of a User-Mode Linux guest (native-shim/uml-keeper.c), a static executable.
 *
 * @throws Error when native-shim is not built
 */
export const umlKeeperPath = (): string => artefactPath("uml-keeper");

/**
 * What an older User-Mode Linux is preloaded with (native-shim/uml-registers.c).
 *
 * @throws Error when native-shim is not built
 */
export const umlRegistersPath = (): string => artefactPath("uml-registers.so");
