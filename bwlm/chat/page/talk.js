// What a person and a model say in turn. Not here: how it is drawn, and how it is sent.
//
// A model writes in one of three manners. `goes_on`: all is one document, which grows at its end, or at its front if
// it is read backward. `answers`: it answers the person. `asks`: the person writes an ending, and the model what came
// before it. So the order of the talk is not always the order of time.

export const ARROWS = { forward: "→", backward: "←", bidirectional: "↔" };
const SEPARATOR = "\n\n";
const MOST_CHARACTERS = 8000; // of one message, and of all: limits of the server, beyond what a context holds
const MOST_IN_ALL = 32000;
const MOST_MESSAGES = 499;

export class Talk {
  /** `turns`, in the order of the talk: {speaker: "person" | "model", text, reading, seed, note}. */
  constructor(model, turns = []) {
    this.model = model;
    this.turns = turns;
  }

  get isDocument() { return this.model.manners[this.model.readings[0]] === "goes_on"; }

  get last() { return this.turns.at(-1); }

  /** Return true if what is written in a reading comes before all that was said so far. */
  isAtFront(reading) {
    const manner = this.model.manners[reading];
    return manner === "asks" || (manner === "goes_on" && reading === "backward");
  }

  /** Return the turns in the order of time. */
  get inOrder() {
    const front = this.turns.filter((turn) => this.isAtFront(turn.reading));
    return [...front.reverse(), ...this.turns.filter((turn) => !this.isAtFront(turn.reading))];
  }

  /** Return the turns in the order of time, each with what stands between it and the one before it. */
  get pieces() {
    return this.inOrder.map((turn, at, all) => ({ turn, joint: at ? this.joint(all[at - 1], turn) : "" }));
  }

  /** Return what stands between two turns: a model goes on right where a document stops, a person begins a paragraph. */
  joint(before, after) {
    if (!this.isDocument) return SEPARATOR;
    const later = this.turns.indexOf(before) > this.turns.indexOf(after) ? before : after;
    return later.speaker === "model" ? "" : SEPARATOR;
  }

  /** Return all that was said, in the order of time. */
  get text() {
    return this.pieces.map(({ turn, joint }) => joint + turn.text).join("");
  }

  /** Return the messages from which the model writes in a reading; a document is one message. */
  messages(reading) {
    if (this.isDocument) {
      const characters = [...this.text];
      const near = reading === "backward" ? characters.slice(0, MOST_CHARACTERS) : characters.slice(-MOST_CHARACTERS);
      return [{ role: "user", content: near.join("") }];
    }
    const turns = [...this.turns];
    while (turns.length > MOST_MESSAGES || characters(turns) > MOST_IN_ALL) turns.splice(0, 2);
    return turns.map(({ speaker, text, reading }) => (
      { role: speaker === "person" ? "user" : "assistant", content: text, direction: reading }));
  }
}

const characters = (turns) => turns.reduce((sum, { text }) => sum + text.length, 0);

/** Return what a model does in a reading: in words for a title, a sentence, and a field's placeholder. */
export function describe(manner, reading) {
  if (manner === "answers") {
    const how = reading === "backward" ? "It writes each answer from its last word to its first." : "";
    return { title: "This model answers", sentence: `Write a message, and it answers. ${how}`, placeholder: "Write a message" };
  }
  if (reading === "backward") {
    const what = manner === "asks" ? "the message to which it replies" : "the text before it";
    const hint = manner === "asks" ? "" : "Begin with a space if your text begins with a new word.";
    return {
      title: "This model writes what came before",
      sentence: `Write an ending, and it writes ${what}, from the last word to the first. Go on, and it goes further back. ${hint}`,
      placeholder: "Write an ending",
    };
  }
  return {
    title: "This model goes on with a text",
    sentence: "Write a beginning, and it goes on from there. It was trained on documents and answers no questions.",
    placeholder: "Write a beginning",
  };
}
