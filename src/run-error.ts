import * as Data from "effect/Data";

/** A guest that cannot be started as it was described. */
export class RunError extends Data.TaggedError("RunError")<{ readonly message: string }> {}
