// What surrounds every page: the top bar, and the way to the picture for keyboards.

import { asset, fill, h, icon, setText } from "../dom.js";
import { t } from "../i18n.js";
import { key, session, nextTheme, theme } from "../prefs.js";
import { PAGES } from "../router.js";

/** @type {Readonly<Record<import("../prefs.js").Theme, import("../types.js").TextKey>>} */
const THEME_WORDS = { system: "theme.system", light: "theme.light", dark: "theme.dark" };

/**
 * @param {ReturnType<typeof import("./dialogs.js").createDialogs>} dialogs
 * @param {import("../job-store.js").JobStore} jobStore
 */
export function createFrame(dialogs, jobStore) {
  const main = h("main", { id: "main" });
  const links = new Map(
    Object.entries(PAGES).map(([name, page]) => [
      name,
      h("a", { href: `#/${name}` }, icon(page.icon), h("span", {}, t(page.label)), badge(page.kind, jobStore)),
    ]),
  );
  const themeButton = h("button", { type: "button", class: "quiet round", on: { click: nextTheme } });
  theme.subscribe((chosen) => {
    const words = t(THEME_WORDS[chosen]);
    fill(themeButton, icon(chosen));
    themeButton.setAttribute("aria-label", words);
    themeButton.title = words;
  });
  const keyButton = roundButton("key", t("key.open"), () => void dialogs.changeKey());
  const showKey = () => (keyButton.hidden = key.get() === null && !session.get());
  key.subscribe(showKey);
  session.subscribe(showKey);
  const header = h(
    "header",
    { class: "bar" },
    h(
      "a",
      { class: "brand", href: "#/create" },
      h("img", { src: asset("icons/weft.svg"), alt: "", width: 28, height: 28 }),
      t("app.name"),
    ),
    h("nav", { class: "pages", "aria-label": t("nav.label"), hidden: links.size < 2 }, ...links.values()),
    h(
      "div",
      { class: "tools" },
      themeButton,
      keyButton,
      roundButton("help", t("help.open"), dialogs.showHelp),
    ),
  );
  return {
    main,
    elements: [h("a", { class: "skip", href: "#stage", on: { click: skip } }, t("app.skip")), header, main],
    /** @param {string} name */
    markPage(name) {
      for (const [other, link] of links) {
        if (other === name) link.setAttribute("aria-current", "page");
        else link.removeAttribute("aria-current");
      }
    },
  };
}

/**
 * How many jobs of a kind ended while something else was looked at.
 *
 * @param {import("../types.js").Kind} kind
 * @param {import("../job-store.js").JobStore} jobStore
 */
function badge(kind, jobStore) {
  const number = h("span", { "aria-hidden": "true" });
  const words = h("span", { class: "visually-hidden" });
  const element = h("span", { class: "badge", hidden: true }, number, words);
  const update = () => {
    const count = jobStore.unseenOf(kind);
    element.hidden = count === 0;
    setText(number, String(count));
    setText(words, t("nav.unseen", { count }));
  };
  jobStore.unseen.subscribe(update);
  return element;
}

/** The address is the router's: move the focus, not the hash. @param {Event} event */
function skip(event) {
  event.preventDefault();
  document.getElementById("stage")?.focus();
}

/**
 * @param {string} name
 * @param {string} words
 * @param {() => void} run
 */
function roundButton(name, words, run) {
  return h(
    "button",
    { type: "button", class: "quiet round", "aria-label": words, title: words, on: { click: run } },
    icon(name),
  );
}
