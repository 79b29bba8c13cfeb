// The surprise of a text in two readings: arithmetic, without drawing.

/** Return bits per piece: [{start, end, bits}], `bits` null where nothing was scored.
 *
 * Offsets count characters. Tokens of one byte may share a character: they are one piece, and its bits are their sum.
 */
export function pieces({ text, offsets, logprobs }) {
  const end = [...text].length;
  const starts = [...new Set(offsets)].filter((start) => start < end).sort((a, b) => a - b);
  return starts.map((start, at) => {
    const own = logprobs.filter((logprob, index) => offsets[index] === start && logprob !== null);
    return { start, end: starts[at + 1] ?? end, bits: own.length ? bits(own) : null };
  });
}

/** Return the pieces of two tokenizations on the finest cuts that both have, so that each pair is of equal text. */
export function aligned(left, right) {
  const shared = new Set(left.map((piece) => piece.start).filter((start) => right.some((piece) => piece.start === start)));
  return [merged(left, shared), merged(right, shared)];
}

/** Return the mean bits per byte over what was scored, and the number of tokens and bytes. */
export function figure(score) {
  const characters = [...score.text];
  const scored = pieces(score).filter((piece) => piece.bits !== null);
  const text = scored.map(({ start, end }) => characters.slice(start, end).join("")).join("");
  const bytes = new TextEncoder().encode(text).length;
  const tokens = score.logprobs.filter((logprob, at) => logprob !== null && score.offsets[at] < characters.length).length;
  const sum = scored.reduce((total, piece) => total + piece.bits, 0);
  return { bits: sum, bytes, tokens, perByte: bytes ? sum / bytes : null };
}

function bits(logprobs) {
  return -logprobs.reduce((sum, logprob) => sum + logprob, 0) / Math.LN2;
}

function merged(one, shared) {
  const found = [];
  for (const piece of one) {
    if (shared.has(piece.start) || !found.length) found.push({ ...piece });
    else Object.assign(found.at(-1), { end: piece.end, bits: sum(found.at(-1).bits, piece.bits) });
  }
  return found;
}

const sum = (a, b) => (a === null || b === null ? null : a + b);
