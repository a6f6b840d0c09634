// As much of a document as the page's parts touch; importing it makes it the global one.

export class FakeElement {
  constructor(tag) {
    Object.assign(this, { tag, children: [], listeners: {}, dataset: {}, hidden: false, value: "" });
    this.style = { setProperty() {} };
    this.classList = { add() {}, remove() {} };
    this.attributes = {};
  }
  setAttribute(name, value) {
    this.attributes[name] = value;
    if (name === "hidden") this.hidden = true;
    if (["id", "src", "min", "max", "step"].includes(name)) this[name] = value;
  }
  removeAttribute(name) {
    delete this.attributes[name];
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
  querySelector(tag) {
    return all(this).find((element) => element.tag === tag) ?? null;
  }
  querySelectorAll(tag) {
    return all(this).filter((element) => element.tag === tag);
  }
  get firstElementChild() {
    return this.children.find((child) => child instanceof FakeElement);
  }
  hasChildNodes() {
    return this.children.length > 0;
  }
  insertBefore(child) {
    this.children.push(child);
  }
  matches(tag) {
    return this.tag === tag;
  }
  after() {}
  remove() {}
  focus() {}
  scrollIntoView() {}
}

/** Every element below one. */
export function all(element) {
  return element.children
    .filter((child) => child instanceof FakeElement)
    .flatMap((child) => [child, ...all(child)]);
}

globalThis.document = {
  createElement: (tag) => new FakeElement(tag),
  createElementNS: (_, tag) => new FakeElement(tag),
};
globalThis.FileReader = class extends FakeElement {
  readAsDataURL(file) {
    this.result = `data:${file.type};base64,AAAA`;
    this.listeners.load();
  }
};
