// The middle of the page: one job in whatever state it is. Built anew when the state changes, updated in between.

import { asset, fill, h, icon, setText, setVar } from "../dom.js";
import { hasEnded, secondsLeft } from "../job-state.js";
import { t } from "../i18n.js";
import { remedy, titleOf } from "./remedy.js";
import { area, button, createResult } from "./result.js";
import { createStages } from "./stages.js";

/** @typedef {import("../types.js").Job} Job */
/** @typedef {import("../types.js").Problem} Problem */

/**
 * What the stage may ask of the page.
 * @typedef {object} Actions
 * @property {() => void} cancel
 * @property {(prompt: string) => void} sample
 * @property {(job: Job, seed: string) => void} again      fill the form from a job
 * @property {(job: Job | null) => void} retry             the same once more; null: the refused request
 * @property {() => void} dismiss                          forget the refused request
 * @property {(job: Job | null, size: { width: number, height: number }) => void} smaller
 * @property {() => void} key
 * @property {(param: string) => void} field
 * @property {(param: string | null) => boolean} hasField
 * @property {(count: number) => void} saved
 * @property {(modelId: string) => import("../types.js").Sizes | null} sizes
 */

/**
 * What is shown.
 * @typedef {{ kind: "loading" } | { kind: "noModels" } | { kind: "first" } | { kind: "sending", key: string, width: number, height: number }
 *   | { kind: "job", job: Job } | { kind: "refused", outgoing?: { key: string, prompt: string }, problem: Problem, size: { width: number, height: number } | null, model: string | null }
 *   } View
 */

/**
 * A built view: shown until its name changes.
 * @typedef {object} Scene
 * @property {Node[]} content
 * @property {(job: Job) => void} [update]
 * @property {() => void} [save]
 * @property {() => void} [leave]
 */

/**
 * @param {ReturnType<typeof import("./pictures.js").createPictures>} pictures
 * @param {import("../workspace.js").Words} words  of the page
 * @param {Actions} actions
 */
export function createStage(pictures, words, actions) {
  const banner = h(
    "p",
    { class: "banner", role: "status", hidden: true },
    icon("unplugged"),
    h("span", {}, t("connection.lost")),
  );
  const scenery = h("div", { class: "scene" });
  const element = h(
    "section",
    { class: "stage", id: "stage", tabindex: -1, "aria-label": t("stage.label") },
    banner,
    scenery,
  );
  // What stands below the canvas is as wide as the canvas, which only layout knows.
  const ruler = new ResizeObserver(([entry]) => {
    if (entry !== undefined) setVar(scenery, "--canvas-width", `${Math.round(entry.contentRect.width)}px`);
  });
  let shown = "";
  /** @type {Scene} */
  let scene = { content: [] };

  /** @param {View} view */
  function build(view) {
    switch (view.kind) {
      case "loading":
        return skeleton({ width: 1, height: 1 }, t("loading.models"));
      case "sending":
        return skeleton(view, t("loading.sending"));
      case "noModels":
        return { content: [message("picture", t("noModels.title"), t(words.noModels))] };
      case "first":
        return first();
      case "refused":
        return problemScene(view.problem, view.size, view.model, null, view.outgoing);
      case "job":
        return jobScene(view.job);
    }
  }

  /** @param {Job} job @returns {Scene} */
  function jobScene(job) {
    switch (job.status) {
      case "queued":
      case "processing":
        return running(job);
      case "completed": {
        const result = createResult(job, { pictures, onAgain: actions.again, onSaved: actions.saved });
        return {
          content: [result.above, h("div", { class: "below" }, ...warnings(job), ...result.below)],
          save: result.save,
        };
      }
      case "cancelled":
        return {
          content: [
            message(
              "stop",
              t("cancelled.title"),
              t("cancelled.text"),
              caption(job.request.prompt),
              button("again", t("fix.again"), () => actions.retry(job)),
            ),
          ],
        };
      case "failed": {
        const problem = job.problem ?? { code: "internal", message: "", param: null, retryAfterS: null };
        return problemScene(problem, job.request, job.request.model, job);
      }
    }
  }

  /** @returns {Scene} */
  function first() {
    const samples = words.samples.map((key) => {
      const prompt = t(key);
      return h(
        "button",
        { type: "button", class: "sample", on: { click: () => actions.sample(prompt) } },
        prompt,
      );
    });
    const welcome = h("img", { class: "welcome", src: asset("icons/welcome.svg"), alt: "", width: 180, height: 180 });
    return {
      content: [
        h(
          "div",
          { class: "message" },
          welcome,
          h("h2", {}, t(words.firstTitle)),
          h("p", { class: "detail" }, t("first.text")),
          h("div", { class: "samples" }, ...samples),
        ),
      ],
    };
  }

  /** @param {Job} job @returns {Scene} */
  function running(job) {
    const preview = h("img", {
      class: "preview",
      alt: t("preview.alt", { prompt: job.request.prompt }),
      hidden: true,
    });
    const canvas = h("div", { class: "canvas waiting" }, h("div", { class: "picture" }, preview));
    const bar = h("progress", { max: 100, "aria-label": t("stage.label") });
    const stages = job.kind === "video" ? createStages() : null;
    const facts = h("p", { class: "facts" });
    const cancel = h("button", { type: "button", class: "plain", on: { click: actions.cancel } });
    /** @param {Job} now */
    const update = (now) => {
      if (now.preview !== null && preview.src !== now.preview) {
        preview.src = now.preview;
        preview.hidden = false;
      }
      canvas.classList.toggle("waiting", now.preview === null);
      if (now.status === "queued") bar.removeAttribute("value");
      else bar.value = now.percent;
      stages?.show(now);
      setText(facts, progressWords(now));
      if (cancel.disabled !== now.cancelRequested || !cancel.hasChildNodes()) {
        cancel.disabled = now.cancelRequested;
        fill(
          cancel,
          icon("close"),
          h("span", {}, t(now.cancelRequested ? "running.cancelling" : "running.cancel")),
          h("kbd", { "aria-hidden": "true" }, "Esc"),
        );
      }
    };
    update(job);
    return {
      content: [
        area(canvas, job.request),
        h(
          "div",
          { class: "below" },
          stages?.element ?? bar,
          ...warnings(job),
          h("div", { class: "row spread under" }, facts, cancel),
        ),
      ],
      update,
    };
  }

  /**
   * @param {Problem} problem
   * @param {{ width: number, height: number } | null} size
   * @param {string | null} model
   * @param {Job | null} job
   * @param {{ prompt: string }} [outgoing]  the refused request
   * @returns {Scene}
   */
  function problemScene(problem, size, model, job, outgoing) {
    const suggestion = remedy(problem, size, model === null ? null : actions.sizes(model), actions.hasField);
    const detail = problem.code === "network" ? t("error.network.text") : problem.message;
    const { node, leave } = fix(suggestion, job);
    const dismiss = outgoing && button("close", t("fix.dismiss"), actions.dismiss);
    const fixes = dismiss === undefined ? node : h("div", { class: "row" }, node, dismiss);
    const prompt = outgoing?.prompt ?? job?.request.prompt ?? null;
    const content = [
      message("alert", t(titleOf(problem.code)), detail, prompt === null ? null : caption(prompt), fixes),
    ];
    return leave === undefined ? { content } : { content, leave };
  }

  /**
   * @param {import("./remedy.js").Remedy} suggestion
   * @param {Job | null} job
   * @returns {{ node: Node | null, leave?: () => void }}
   */
  function fix(suggestion, job) {
    switch (suggestion.kind) {
      case "again":
        return { node: button("again", t("fix.again"), () => actions.retry(job)) };
      case "smaller":
        return {
          node: button("again", t("fix.smaller", { width: suggestion.width, height: suggestion.height }), () =>
            actions.smaller(job, suggestion),
          ),
        };
      case "key":
        return { node: button("key", t("fix.key"), actions.key) };
      case "field":
        return { node: button("again", t("fix.field"), () => actions.field(suggestion.param)) };
      case "wait":
        return countdown(suggestion.seconds, () => actions.retry(job));
      case "none":
        return { node: null };
    }
  }

  return {
    element,
    /** @param {View} view */
    show(view) {
      const name =
        view.kind === "job"
          ? `job ${view.job.id} ${hasEnded(view.job) ? view.job.status : "running"}`
          : JSON.stringify(view);
      if (name === shown && view.kind === "job") {
        scene.update?.(view.job);
      } else if (name !== shown) {
        shown = name;
        scene.leave?.();
        scene = build(view);
        fill(scenery, ...scene.content);
        ruler.disconnect();
        const canvas = scenery.querySelector(".canvas");
        if (canvas !== null) ruler.observe(canvas);
      }
    },
    /** On a phone the form may hide the stage. */
    comeIntoView() {
      element.scrollIntoView({ block: "nearest" });
    },
    /** @param {boolean} connected */
    setConnected(connected) {
      banner.hidden = connected;
    },
    /** Saves the picture on the stage; false when there is none. */
    save() {
      scene.save?.();
      return scene.save !== undefined;
    },
  };
}

/**
 * @param {{ width: number, height: number }} size
 * @param {string} words
 * @returns {Scene}
 */
function skeleton(size, words) {
  const canvas = h("div", { class: "canvas waiting" }, h("div", { class: "picture" }));
  return { content: [area(canvas, size), h("div", { class: "below" }, h("p", { class: "facts" }, words))] };
}

/**
 * @param {string} name
 * @param {string} title
 * @param {string} text
 * @param {...(Node | null)} more
 */
function message(name, title, text, ...more) {
  return h(
    "div",
    { class: `message ${name}` },
    icon(name),
    h("h2", {}, title),
    text !== "" && h("p", { class: "detail" }, text),
    ...more,
  );
}

/** @param {string} prompt */
function caption(prompt) {
  return h("p", { class: "caption" }, prompt);
}

/** What the service changed in a request. @param {Job} job */
function warnings(job) {
  if (job.warnings.length === 0) return [];
  const rows = job.warnings.map((warning) => h("li", {}, icon("info"), h("span", {}, warning.message)));
  return [h("ul", { class: "warnings", "aria-label": t("warnings.label") }, ...rows)];
}

/** @param {Job} job */
function progressWords(job) {
  if (job.status === "queued") {
    if (job.ahead === null) return t("queued.waiting");
    return job.ahead === 0 ? t("queued.next") : t("queued.ahead", { count: job.ahead });
  }
  if (job.step === 0) return t("running.starting");
  if (job.encode !== null) return t("running.encoding", { ...job.encode });
  if (job.decode !== null) return t("running.decoding", { ...job.decode });
  if (job.step >= job.steps) return t(job.kind === "video" ? "running.decodingSoon" : "running.finishing");
  const step = t("running.step", { step: job.step, steps: job.steps });
  const left = secondsLeft(job);
  return left === null ? step : `${step} · ${t("running.left", { count: Math.max(1, Math.round(left)) })}`;
}

/**
 * A button that opens when the time is up.
 *
 * @param {number} seconds
 * @param {() => void} run
 */
function countdown(seconds, run) {
  const words = h("span");
  const node = h(
    "button",
    { type: "button", class: "plain", disabled: true, on: { click: run } },
    icon("clock"),
    words,
  );
  let left = seconds;
  const tick = () => {
    node.disabled = left > 0;
    setText(words, left > 0 ? t("fix.wait", { count: left }) : t("fix.again"));
    if (left <= 0) clearInterval(timer);
    left -= 1;
  };
  const timer = setInterval(tick, 1000);
  tick();
  return { node, leave: () => clearInterval(timer) };
}
