// The two dialogs: the access key, and the list of shortcuts.

import { h, icon } from "../dom.js";
import { t } from "../i18n.js";
import { key, session, singleKeys } from "../prefs.js";

/** @param {() => Promise<void>} logOut */
export function createDialogs(logOut) {
  const keyDialog = createKeyDialog();
  const help = createHelp();
  return {
    element: h("div", {}, keyDialog.element, help),
    /** After a 401. True when a key was given. */
    askForKey: () => keyDialog.ask(key.get() !== null),
    /** The person asked for another key: everything is read again with it. */
    async changeKey() {
      const before = key.get();
      const forgotten = await keyDialog.ask(false).then(() => keyDialog.forgotten());
      if (forgotten && session.get()) await logOut().catch(() => undefined); // it was over already
      if (forgotten || key.get() !== before) location.reload();
    },
    showHelp: () => help.showModal(),
  };
}

function createKeyDialog() {
  const input = h("input", { id: "key-input", type: "password", autocomplete: "off", required: true });
  const wrong = h("p", { class: "fault", role: "alert", hidden: true }, t("key.wrong"));
  const forget = h(
    "button",
    { type: "button", class: "plain", on: { click: () => finish(null) } },
    t("key.forget"),
  );
  const form = h(
    "form",
    { on: { submit: used } },
    h("p", {}, t("key.text")),
    h("label", { for: "key-input" }, t("key.label")),
    input,
    wrong,
    h("div", { class: "row" }, h("button", { type: "submit", class: "primary" }, t("key.use")), forget),
  );
  const element = dialog("key", t("key.title"), form);
  /** @type {Promise<boolean> | null} everyone who needs the key waits for the same answer */
  let asking = null;
  let given = false;
  let forgotten = false;

  /** @param {SubmitEvent} event */
  function used(event) {
    event.preventDefault();
    finish(input.value.trim());
  }

  /** @param {string | null} value */
  function finish(value) {
    key.set(value);
    given = value !== null;
    forgotten = value === null;
    element.close();
  }

  return {
    element,
    forgotten: () => forgotten,
    /** True when a key was given; false when the dialog was closed without one. @param {boolean} refused */
    ask(refused) {
      asking ??= new Promise((resolve) => {
        given = forgotten = false;
        input.value = "";
        wrong.hidden = !refused;
        forget.hidden = key.get() === null && !session.get();
        element.addEventListener(
          "close",
          () => {
            asking = null;
            resolve(given);
          },
          { once: true },
        );
        element.showModal();
      });
      return asking;
    },
  };
}

function createHelp() {
  const single = h("input", { type: "checkbox", id: "single-keys", checked: singleKeys.get() });
  single.addEventListener("change", () => singleKeys.set(single.checked));
  return dialog(
    "help",
    t("help.title"),
    h(
      "dl",
      { class: "keys" },
      ...shortcut(t("help.generate"), "Ctrl", "Enter"),
      ...shortcut(t("help.save"), "Ctrl", "S"),
      ...shortcut(t("help.cancel"), "Esc"),
      ...shortcut(t("help.help"), "?"),
    ),
    h("label", { class: "check", for: "single-keys" }, single, t("help.single")),
    h("p", {}, h("a", { href: "../docs" }, t("help.docs"))),
  );
}

/**
 * @param {string} words
 * @param {...string} keys
 */
function shortcut(words, ...keys) {
  return [h("dt", {}, words), h("dd", {}, ...keys.map((name) => h("kbd", {}, name)))];
}

/**
 * @param {string} id
 * @param {string} title
 * @param {...Node} content
 */
function dialog(id, title, ...content) {
  const close = h(
    "button",
    {
      type: "button",
      class: "quiet round",
      "aria-label": t("dialog.close"),
      on: { click: () => element.close() },
    },
    icon("close"),
  );
  const element = h(
    "dialog",
    { id: `${id}-dialog`, "aria-labelledby": `${id}-title` },
    h("div", { class: "row spread" }, h("h2", { id: `${id}-title` }, title), close),
    ...content,
  );
  return element;
}
