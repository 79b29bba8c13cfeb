/** Return the element of an id. */
export const byId = (id) => document.getElementById(id);

/** Return a new element. Its text is text, never markup. */
export function make(tag, classes = "", text = "") {
  const element = document.createElement(tag);
  element.className = classes;
  element.textContent = text;
  return element;
}

/** Return a new button that does something. */
export function makeButton(text, label, action) {
  const button = make("button", "quiet", text);
  button.type = "button";
  button.ariaLabel = label;
  button.addEventListener("click", action);
  return button;
}

/** Say what goes on, or what failed. */
export function say(element, text, isFault = false) {
  element.textContent = text;
  element.classList.toggle("fault", isFault);
}

/** Resolve after some seconds; reject if the signal aborts first. */
export function wait(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
