// A page where something is made: the form on the left, the job on the stage, the recent ones below.

import { ApiError } from "./api.js";
import { h } from "./dom.js";
import { formOf, lacksPictures } from "./form-rules.js";
import { t } from "./i18n.js";
import { hasEnded } from "./job-state.js";
import { listen } from "./keys.js";
import { createFilmstrip } from "./parts/filmstrip.js";
import { titleOf } from "./parts/remedy.js";
import { createSettingsPanel } from "./parts/settings-panel.js";
import { createStage } from "./parts/stage.js";
import { keepDraft, readDraft, singleKeys } from "./prefs.js";
import { videoValuesOf } from "./video-rules.js";

/** @typedef {import("./types.js").Job} Job */
/** @typedef {import("./types.js").Kind} Kind */
/** @typedef {import("./types.js").Model} Model */
/** @typedef {import("./types.js").TextKey} TextKey */

/**
 * The page's own words.
 * @typedef {object} Words
 * @property {TextKey} title
 * @property {TextKey} promptHint
 * @property {TextKey} promptEmpty
 * @property {TextKey} firstTitle
 * @property {TextKey[]} samples
 * @property {TextKey} noModels
 */

/**
 * What one page makes.
 * @typedef {object} Craft
 * @property {Kind} kind
 * @property {(model: Model) => Model | null} modelFor  as the form sees it; null: it cannot make this
 * @property {(form: import("./types.js").FormValues, model: Model) => object} body  of the request
 * @property {Words} words
 */

const MODELS_MS = 4_000; // while a model is loading

/**
 * @param {Craft} craft
 * @returns {import("./router.js").Mount}
 */
export function createWorkspace(craft) {
  return (root, services) => mount(craft, root, services);
}

/**
 * @param {Craft} craft
 * @param {HTMLElement} root
 * @param {import("./app.js").Services} services
 */
function mount({ kind, modelFor, body, words }, root, { api, pictures, toast, dialogs, jobStore }) {
  const left = new AbortController();
  /** @type {Model[] | null} null until they were read */
  let models = null;
  /** @type {import("./types.js").Problem | null} why the start failed */
  let startProblem = null;
  let opened = false;
  /** @type {string | null} the refused request that the form's next one replaces */
  let mended = null;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let modelsTimer;

  const panel = createSettingsPanel({
    kind,
    words,
    onSubmit: send,
    onChange: (form) => keepDraft(form, kind),
    addLora: api.addLora,
  });
  const stage = createStage(pictures, words, {
    cancel: () => void jobStore.cancel(kind),
    sample(prompt) {
      panel.write({ ...panel.read(), prompt });
      panel.submit();
    },
    again(job, seed) {
      const form = again(job, seed);
      panel.write(form);
      if (!noteMissing(job, form)) toast.show(t(job.kind === "video" ? "video.filled" : "done.filled"));
    },
    retry(job) {
      if (startProblem !== null) {
        void open();
        return;
      }
      const refused = jobStore.currentOutgoing(kind);
      if (refused !== undefined) jobStore.retry(refused.key);
      else if (job === null) jobStore.select(kind, jobStore.shown[kind].get());
      else {
        const form = again(job, job.request.seed);
        panel.write(form);
        if (!noteMissing(job, form)) panel.submit();
      }
    },
    smaller(job, { width, height }) {
      const form = job === null ? mend() : again(job, job.request.seed);
      panel.write({ ...form, width, height });
      if (job !== null && noteMissing(job, form)) return;
      panel.submit();
    },
    key: () => void dialogs.changeKey(),
    dismiss() {
      const refused = jobStore.currentOutgoing(kind);
      if (refused !== undefined) jobStore.dismiss(kind, refused.key);
      stage.element.focus(); // the button is gone
    },
    field(param) {
      if (jobStore.currentOutgoing(kind) !== undefined) panel.write(mend());
      panel.focus(param);
    },
    hasField: panel.has,
    saved: (count) => toast.show(t("done.saved", { count })),
    sizes: (id) => models?.find((model) => model.id === id)?.sizes ?? null,
  });
  const strip = createFilmstrip(pictures, (key) => {
    jobStore.select(kind, key);
    stage.comeIntoView();
  });

  root.replaceChildren(
    h(
      "div",
      { class: "create" },
      h("h1", { class: "visually-hidden" }, t(words.title)),
      panel.element,
      stage.element,
      strip.element,
    ),
  );

  /**
   * The form that asks for a job again.
   *
   * @param {Job} job
   * @param {string} seed
   */
  function again(job, seed) {
    const { controls, video } = panel.read();
    return { ...formOf(job.request, seed, controls), video: videoValuesOf(job.request, video) };
  }

  /** The form of the refused request on the stage, which the form's next request replaces. */
  function mend() {
    const refused = jobStore.currentOutgoing(kind);
    if (refused === undefined) return panel.read();
    mended = refused.key;
    return refused.form;
  }

  /**
   * Says that the form lacks the pictures which a job began from; false: it lacks none.
   *
   * @param {Job} job
   * @param {import("./types.js").FormValues} form
   */
  function noteMissing(job, form) {
    const missing = lacksPictures(job.request, form);
    if (missing) toast.show(t(job.kind === "video" ? "video.missing" : "done.missing"));
    return missing;
  }

  /**
   * @param {import("./types.js").FormValues} form
   * @param {Model} model
   */
  function send(form, model) {
    jobStore.submit(kind, body(form, model), form);
    if (mended !== null) jobStore.dismiss(kind, mended);
    mended = null;
    stage.comeIntoView();
  }

  /** @returns {import("./parts/stage.js").View} */
  function view() {
    if (startProblem !== null) return { kind: "refused", problem: startProblem, size: null, model: null };
    if (models === null || !opened) return { kind: "loading" };
    const job = jobStore.current(kind);
    const problem = jobStore.problem.get();
    if (problem !== null) return { kind: "refused", problem, size: null, model: null };
    if (job !== undefined) return { kind: "job", job };
    const outgoing = jobStore.currentOutgoing(kind);
    if (outgoing !== undefined) {
      const { key, form, problem: refusal } = outgoing;
      const size = { width: form.width, height: form.height };
      if (refusal === null) return { kind: "sending", key, ...size };
      return { kind: "refused", outgoing: { key, prompt: form.prompt }, problem: refusal, size, model: form.model };
    }
    return models.length === 0 ? { kind: "noModels" } : { kind: "first" };
  }

  function render() {
    stage.show(view());
    strip.show(jobStore.entries(kind), jobStore.shown[kind].get());
  }

  /** @param {Job} job */
  const ready = (job) =>
    job.kind === "video" ? t("live.video") : t("live.ready", { count: job.pictures.length });

  /** Screen reader announcements of the job on the stage: state changes and half time, not every step. */
  let announced = "";
  function announce() {
    const job = jobStore.current(kind);
    if (job === undefined) return;
    const half = job.status === "processing" && job.percent >= 50;
    const milestone = `${job.id} ${job.status} ${half}`;
    if (milestone === announced) return;
    const before = announced;
    announced = milestone;
    if (hasEnded(job) && !before.startsWith(job.id)) return; // picked from the strip: it is not new
    if (job.status === "queued") toast.announce(t("live.queued"));
    else if (half) toast.announce(t("live.half"));
    else if (job.status === "completed") toast.announce(ready(job));
    else if (job.status === "cancelled") toast.announce(t("live.cancelled"));
    else if (job.status === "failed")
      toast.announce(t("live.failed", { reason: t(titleOf(job.problem?.code ?? "")) }));
  }

  async function open() {
    startProblem = null;
    models = null;
    opened = false;
    render();
    try {
      models = await readModels();
      panel.offer(models, readDraft(kind));
      void offerLoras();
      panel.element.inert = models.length === 0;
      await jobStore.open(kind);
      opened = true;
      render();
      watchModels();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      startProblem = error.problem;
      render();
    }
  }

  /** The page works without them. */
  async function offerLoras() {
    try {
      panel.offerLoras(await api.loras());
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
    }
  }

  async function readModels() {
    return (await api.models()).flatMap((model) => modelFor(model) ?? []);
  }

  /** Reads the states again while a model is loading. */
  function watchModels() {
    clearTimeout(modelsTimer);
    if (!models?.some((model) => model.state === "loading")) return;
    modelsTimer = setTimeout(async () => {
      try {
        models = await readModels();
        panel.refresh(models);
      } catch {
        // the next round tries again
      }
      watchModels();
    }, MODELS_MS);
  }

  /** Screen reader announcements of refused requests, each once. */
  const refusals = new Set(jobStore.outgoing.get().flatMap(({ key, problem }) => (problem ? [key] : [])));
  function announceRefusals() {
    for (const { key, problem } of jobStore.outgoing.get()) {
      if (problem === null) refusals.delete(key);
      else if (!refusals.has(key)) {
        refusals.add(key);
        toast.announce(t(titleOf(problem.code)));
      }
    }
  }

  const stops = [
    jobStore.jobs.subscribe(() => (render(), announce())),
    jobStore.shown[kind].subscribe(() => (render(), announce())),
    jobStore.unseen.subscribe(render),
    jobStore.outgoing.subscribe(() => (render(), announceRefusals())),
    jobStore.problem.subscribe((problem) => {
      render();
      if (problem !== null) toast.announce(t(titleOf(problem.code)));
    }),
    jobStore.connected.subscribe(stage.setConnected),
  ];

  listen(
    [
      { key: "Enter", command: true, run: () => (panel.submit(), true) },
      { key: "s", command: true, run: () => stage.save() },
      {
        key: "Escape",
        run() {
          const job = jobStore.current(kind);
          if (job === undefined || hasEnded(job)) return false;
          void jobStore.cancel(kind);
          return true;
        },
      },
      { key: "?", run: () => (dialogs.showHelp(), true) },
    ],
    singleKeys.get,
    left.signal,
  );
  void open();

  return () => {
    left.abort();
    clearTimeout(modelsTimer);
    for (const stop of stops) stop();
    jobStore.leave(kind);
  };
}
