/**
 * What a test needs from the machine. On a user's machine a test whose prerequisites are missing is skipped and
 * says what to install; with CI=true it runs all the same, and fails.
 */
import { accessSync, constants } from "node:fs";
import * as path from "node:path";
import test, { type TestFn } from "ava";

/** A program and the Debian package that brings it. */
export type Program = readonly [program: string, debianPackage: string];

/** `test`, or `test.skip` where one of `programs` is missing. */
export const testWith = (...programs: readonly Program[]): TestFn | TestFn["skip"] => {
  const missing = programs.filter(([program]) => findOnPath(program) === undefined);
  if (missing.length === 0) return test;
  const needs = missing.map(([program, debianPackage]) => `${program} (Debian package ${debianPackage})`);
  const message = `needs ${needs.join(", ")}`;
  if (process.env.CI === "true") {
    test("the prerequisites of these tests are installed", (t) => t.fail(message));
    return test;
  }
  console.error(`skipped: ${message}`);
  return test.skip;
};

/** The full path of `program` on PATH and in the folders of programs that only root has there. */
export const findOnPath = (program: string): string | undefined =>
  [...(process.env.PATH ?? "").split(":"), "/usr/sbin", "/sbin"]
    .map((folder) => path.join(folder, program))
    .find((file) => {
      try {
        accessSync(file, constants.X_OK);
        return true;
      } catch {
        return false;
      }
    });
