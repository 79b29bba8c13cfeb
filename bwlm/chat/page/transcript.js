// Draws what was said, in the order of time: messages, or one document.

import { make, makeButton } from "./dom.js";
import { Growth } from "./growth.js";
import { ARROWS } from "./talk.js";

/** Draw a talk into an element. `actions`: {copy, retry}, each optional. */
export function draw(element, talk, actions = {}) {
  element.replaceChildren(...(talk.isDocument ? sheet(talk, actions) : talk.inOrder.map((turn) => message(talk, turn, actions))));
}

/** Draw a talk with room for the model's next text, and return that text as it grows. */
export function drawGrowing(element, talk, reading) {
  draw(element, talk);
  const isFirst = talk.isAtFront(reading);
  if (talk.isDocument) {
    const text = make("span", "model");
    element.firstChild[isFirst ? "prepend" : "append"](text);
    return new Growth(text, isFirst);
  }
  const item = message(talk, { speaker: "model", text: "", reading }, {});
  element[isFirst ? "prepend" : "append"](item);
  return new Growth(item.querySelector(".text"), reading === "backward");
}

function sheet(talk, actions) {
  if (!talk.turns.length) return [make("div", "sheet")];
  const text = make("div", "sheet");
  for (const { turn, joint } of talk.pieces) text.append(joint, make("span", turn.speaker, turn.text));
  const label = make("div", "label", note(talk.last));
  label.append(...buttons(talk, talk.last, talk.text, actions));
  const turn = make("article", "turn model");
  turn.ariaLabel = "Document; what you wrote is bold";
  turn.append(text, label);
  return [turn];
}

function message(talk, turn, actions) {
  const item = make("article", `turn ${turn.speaker}`);
  item.ariaLabel = turn.speaker === "person" ? "You" : `Model, ${turn.reading}`;
  const label = make("div", "label", turn.speaker === "person" ? "" : `${ARROWS[turn.reading]} ${note(turn)}`);
  label.append(...buttons(talk, turn, turn.text, actions));
  item.append(make("div", "text", turn.text), ...(turn.speaker === "model" ? [label] : []));
  return item;
}

function note(turn) {
  return [turn.note, turn.seed !== undefined && `seed ${turn.seed}`].filter(Boolean).join(" · ");
}

function buttons(talk, turn, text, { copy, retry }) {
  const found = copy ? [makeButton("Copy", "Copy this text", () => copy(text))] : [];
  if (retry && turn === talk.last && turn.speaker === "model") found.push(makeButton("Retry", "Write this again", retry));
  return found;
}
