import assert from "node:assert/strict";
import { test } from "node:test";

import { fill, h, setText } from "../../../../serve_app/web/js/dom.js";

class FakeElement {
  constructor(tag) {
    Object.assign(this, { tag, attributes: {}, children: [], listeners: {} });
  }
  setAttribute(name, value) {
    this.attributes[name] = value;
  }
  addEventListener(type, listener) {
    this.listeners[type] = listener;
  }
  append(...children) {
    this.children.push(...children);
  }
  replaceChildren(...children) {
    this.children = children;
  }
}
globalThis.document = { createElement: (tag) => new FakeElement(tag) };

test("values become attributes, absent ones none, listeners are listened to", () => {
  let clicked = 0;

  const button = h("button", {
    type: "button",
    disabled: true,
    hidden: false,
    title: null,
    "aria-label": "x",
    on: { click: () => clicked++ },
  });
  button.listeners.click();

  assert.deepEqual(button.attributes, { type: "button", disabled: "", "aria-label": "x" });
  assert.equal(clicked, 1);
});

test("children are nodes or text; what is not there leaves no trace", () => {
  const child = h("b");
  const parent = h("p", {}, "<i>", child, null, false, undefined, "");

  assert.deepEqual(parent.children, ["<i>", child, ""]);
  fill(parent, null, "new");
  assert.deepEqual(parent.children, ["new"]);
});

test("text is written only when it differs", () => {
  let writes = 0;
  const element = {
    get textContent() {
      return "same";
    },
    set textContent(_) {
      writes++;
    },
  };

  setText(element, "same");
  setText(element, "other");

  assert.equal(writes, 1);
});
