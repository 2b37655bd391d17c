/**
 * `FILE[,word]...`: a file name, then words which say how it is used.
 *
 * File names may hold commas, so only *known* words at the end are taken off; everything before them is the
 * name. Where a name itself ends in such a word, an empty word closes it: `odd,readonly,` is the file
 * `odd,readonly`, and `odd,readonly,,direct` is the same file with `direct`. So any name followed by a comma
 * is taken as it stands.
 */
import { UsageError } from "./usage-error.ts";

/** What may follow a file name: plain words, and words that carry a value (`socket=PATH`). */
export interface KnownWords {
  readonly plain: readonly string[];
  readonly withValue: readonly string[];
}

/** A file name and the words that followed it; a plain word's value is the empty string. */
export interface FileWords {
  readonly file: string;
  readonly words: ReadonlyMap<string, string>;
}

/**
 * Takes `text` apart. `option` names the option in messages (`--block`).
 *
 * Throws {@link UsageError} when the name is empty, when a word is given twice or without its value, and when
 * the last part looks like a misspelt word.
 */
export const splitFileWords = (option: string, text: string, known: KnownWords): FileWords => {
  const words = new Map<string, string>();
  const parts = text.split(",");
  let closed = false;
  while (parts.length > 1) {
    const part = parts[parts.length - 1];
    if (part === "") {
      closed = true;
      parts.pop();
      break;
    }
    const [word, value] = readWord(part);
    if (!known.plain.includes(part) && !(value !== undefined && known.withValue.includes(word))) break;
    if (value === "") throw new UsageError({ message: `${option}=${text}: "${word}=" has no value.` });
    if (words.has(word)) throw new UsageError({ message: `${option}=${text}: "${word}" is given twice.` });
    words.set(word, value ?? "");
    parts.pop();
  }
  const file = parts.join(",");
  if (file === "") throw new UsageError({ message: `${option}=${text}: the file name is missing.` });
  if (!closed && parts.length > 1) refuseMisspelt(option, text, parts[parts.length - 1], known);
  return { file, words };
};

const readWord = (part: string): [word: string, value: string | undefined] => {
  const equals = part.indexOf("=");
  return equals < 0 ? [part, undefined] : [part.slice(0, equals), part.slice(equals + 1)];
};

/** A disk that was meant to be read-only must not become a writable one with a strange name. */
const refuseMisspelt = (option: string, text: string, part: string, known: KnownWords): void => {
  const [word] = readWord(part);
  const all = [...known.plain, ...known.withValue];
  const meant = all.find((candidate) => isNear(word, candidate));
  if (meant === undefined) return;
  const written = known.withValue.includes(meant) ? `${meant}=…` : meant;
  throw new UsageError({
    message:
      `${option}=${text}: "${part}" is not a word that ${option} knows; did you mean "${written}"? ` +
      `If it belongs to the file's name, close the name with a comma: ${option}=${text},`,
  });
};

/** True when `word` is an abbreviation of `candidate` or at most two edits away from it. */
const isNear = (word: string, candidate: string): boolean =>
  (word.length >= 4 && candidate.startsWith(word)) ||
  (word.length >= 4 && editDistance(word.toLowerCase(), candidate) <= 2);

/** The Levenshtein distance: insertions, deletions and replacements that lead from `a` to `b`. */
const editDistance = (a: string, b: string): number => {
  let previous = Array.from({ length: b.length + 1 }, (_, column) => column);
  for (let row = 1; row <= a.length; row++) {
    const current = [row];
    for (let column = 1; column <= b.length; column++) {
      const replaced = previous[column - 1] + (a[row - 1] === b[column - 1] ? 0 : 1);
      current.push(Math.min(replaced, previous[column] + 1, current[column - 1] + 1));
    }
    previous = current;
  }
  return previous[b.length];
};
