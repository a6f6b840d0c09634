// The page's start: words, API, frame, first page.

import { createApi } from "./api.js";
import { loadIcons } from "./dom.js";
import { loadLanguage, preferredLanguage } from "./i18n.js";
import { createJobStore } from "./job-store.js";
import { createDialogs } from "./parts/dialogs.js";
import { createFrame } from "./parts/frame.js";
import { createPictures } from "./parts/pictures.js";
import { createToast } from "./parts/toast.js";
import { key, session } from "./prefs.js";
import { route } from "./router.js";

/**
 * What every page gets.
 * @typedef {object} Services
 * @property {import("./types.js").Api} api
 * @property {import("./job-store.js").JobStore} jobStore  of the whole page
 * @property {ReturnType<typeof createPictures>} pictures
 * @property {ReturnType<typeof createToast>} toast
 * @property {ReturnType<typeof createDialogs>} dialogs
 */

async function start() {
  const [icons] = await Promise.all([loadIcons(), loadLanguage(preferredLanguage(navigator.languages))]);
  const dialogs = createDialogs(() => api.logOut());
  const api = createApi({
    base: new URL("../api/", document.baseURI),
    key: key.get,
    askForKey: dialogs.askForKey,
    signedIn(on) {
      if (on) key.set(null);
      session.set(on);
    },
  });
  const toast = createToast();
  const jobStore = createJobStore(api);
  const pictures = createPictures(api, () => key.get() !== null);
  const services = { api, dialogs, toast, jobStore, pictures };
  const frame = createFrame(dialogs, jobStore);
  window.addEventListener("beforeunload", (event) => {
    if (jobStore.unsent()) event.preventDefault(); // the browser asks whether to leave
  });
  document.body.replaceChildren(icons, ...frame.elements, toast.element, dialogs.element);
  await route(frame.main, services, frame.markPage);
}

void start();
