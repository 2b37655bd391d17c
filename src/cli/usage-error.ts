import * as Data from "effect/Data";

/**
 * The command line is wrong. `message` says which word is wrong and what would be right. The caller prints it
 * and `usageText` to stderr and leaves with status 2.
 */
export class UsageError extends Data.TaggedError("UsageError")<{ readonly message: string }> {}
