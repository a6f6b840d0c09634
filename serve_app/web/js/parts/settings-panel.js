// The form: what to make. It shows only what the chosen model understands.

import { fill, h, icon, setText, setVar } from "../dom.js";
import {
  changedModel,
  fittingLoras,
  isFixed,
  seedIsValid,
  shapes,
  sizeFault,
  stepsNotice,
  within,
  withWord,
} from "../form-rules.js";
import { translate, t } from "../i18n.js";
import { NO_VIDEO_VALUES } from "../video-rules.js";
import { createControlPictures } from "./control-pictures.js";
import { chips, fault, select, slider } from "./fields.js";
import { createLoraPicker } from "./lora-picker.js";
import { createVideoFields } from "./video-fields.js";

/** @typedef {import("../types.js").FormValues} FormValues */
/** @typedef {import("../types.js").Model} Model */

/** @type {Readonly<Record<string, { key: import("../types.js").TextKey, tone: string }>>} */
const STATES = {
  ready: { key: "model.state.ready", tone: "good" },
  loading: { key: "model.state.loading", tone: "busy" },
  idle: { key: "model.state.idle", tone: "idle" },
  absent: { key: "model.state.absent", tone: "bad" },
  failed: { key: "model.state.error", tone: "bad" },
  error: { key: "model.state.error", tone: "bad" },
};

/** @type {Readonly<Record<import("../types.js").Kind, { value: string, key: import("../types.js").TextKey }[]>>} */
const FORMATS = {
  image: [
    { value: "png", key: "format.png" },
    { value: "jpeg", key: "format.jpeg" },
    { value: "webp", key: "format.webp" },
  ],
  video: [
    { value: "mp4", key: "format.mp4" },
    { value: "webm", key: "format.webm" },
    { value: "av1", key: "format.av1" },
  ],
};

/**
 * @param {{
 *   kind: import("../types.js").Kind,
 *   words: import("../workspace.js").Words,
 *   onSubmit: (form: FormValues, model: Model) => void,
 *   onChange: (form: FormValues) => void,
 *   addLora: (file: File) => Promise<import("../types.js").Lora>,
 * }} options  addLora: registers an uploaded file
 */
export function createSettingsPanel({ kind, words, onSubmit, onChange, addLora }) {
  /** @type {import("../types.js").Lora[]} */
  let loras = [];
  /** @type {Model[]} */
  let models = [];
  /** @type {Model | null} */
  let model = null;
  // The form's truth where no control holds it: the person's values are kept while a model ignores them.
  let stepsChosen = /** @type {number | null} */ (null);
  let guidanceChosen = /** @type {number | null} */ (null);

  const changed = () => void (model !== null && onChange(read()));

  const state = h("span", { class: "state", role: "status" });
  const modelField = select({ id: "model", label: t("model.label"), onInput: pickModel });
  modelField.element.firstElementChild?.after(state);
  const licence = h("p", { class: "small" });
  const notice = h("div", { class: "notice", role: "note", hidden: true });

  const prompt = h("textarea", {
    id: "prompt",
    rows: 4,
    placeholder: t(words.promptHint),
    spellcheck: "true",
    on: { input: () => (promptFault.show(null), changed()) },
  });
  const promptFault = fault([prompt], "prompt-fault");
  const negative = h("textarea", {
    id: "negative",
    rows: 2,
    placeholder: t("negative.hint"),
    on: { input: changed },
  });
  const negativeField = labelled("negative", t("negative.label"), negative);

  const sizeWords = h("output", { class: "small" });
  const shape = chips({ name: "shape", legend: t("shape.label"), onInput: pickShape, trailing: sizeWords });
  const width = number("width", sizeTyped);
  const height = number("height", sizeTyped);
  const sizeProblem = fault([width, height], "size-fault");

  const steps = slider({
    id: "steps",
    label: t("steps.label"),
    step: "1",
    onInput: () => ((stepsChosen = steps.get()), changed()),
  });
  const guidance = slider({
    id: "guidance",
    label: t("guidance.label"),
    step: "0.1",
    onInput: () => ((guidanceChosen = guidance.get()), changed()),
  });
  const images = chips({ name: "images", legend: t("images.label"), onInput: changed });

  const seed = h("input", {
    id: "seed",
    inputmode: "numeric",
    autocomplete: "off",
    placeholder: t("seed.random"),
    maxlength: 19,
    on: { input: () => (checkSeed(), changed()) },
  });
  const seedFault = fault([seed], "seed-fault");
  const clearSeed = tool("close", t("seed.clear"), () => setSeed(""));
  const rollSeed = tool("dice", t("seed.roll"), () =>
    setSeed(String(crypto.getRandomValues(new Uint32Array(1))[0])),
  );

  const format = select({ id: "format", label: t("format.label"), onInput: changed });
  format.offer(FORMATS[kind].map(({ value, key }) => ({ value, words: t(key) })));
  const scheduler = select({ id: "scheduler", label: t("scheduler.label"), onInput: changed });

  const controlPictures = createControlPictures({ onInput: changed });
  const loraPicker = createLoraPicker({
    onInput: changed,
    onWord(word) {
      prompt.value = withWord(prompt.value, word);
      promptFault.show(null);
      changed();
    },
    async upload(file) {
      const lora = await addLora(file);
      loras = [...loras.filter((known) => known.id !== lora.id), lora];
      if (model !== null) loraPicker.offer(fittingLoras(loras, model), model.maxLoras);
      return lora;
    },
  });
  const video = kind === "video" ? createVideoFields({ onInput: changed }) : null;
  const refiner = h("input", { id: "refiner", type: "checkbox", on: { change: changed } });
  const refinerField = h("label", { class: "check", for: "refiner" }, refiner, t("refiner.label"));

  const generate = h(
    "button",
    { type: "submit", class: "primary generate", id: "generate", disabled: true },
    icon("sparkle"),
    h("span", {}, t("generate.label")),
    h("kbd", { "aria-hidden": "true" }, "Ctrl ⏎"),
  );

  const settings = h(
    "details",
    { class: "settings", open: true },
    h("summary", {}, t("settings.label")),
    h(
      "div",
      { class: "group" },
      h(
        "div",
        { class: "pair" },
        labelled("width", t("width.label"), width),
        labelled("height", t("height.label"), height),
      ),
      sizeProblem.element,
      steps.element,
      guidance.element,
      images.element,
      h(
        "div",
        { class: "field" },
        h("label", { for: "seed" }, t("seed.label")),
        h("div", { class: "with-tool" }, seed, clearSeed, rollSeed),
      ),
      seedFault.element,
      h("div", { class: "pair" }, format.element, scheduler.element),
      refinerField,
    ),
  );

  const needModel = [
    modelField.element,
    shape.element,
    ...(video === null ? [] : [video.start, video.length]),
    loraPicker.element,
    controlPictures.element,
    settings,
  ];
  for (const part of needModel) part.inert = true; // until the models' limits are known

  const element = h(
    "form",
    {
      class: "panel",
      novalidate: true, // our own words, and the fix beside them
      "aria-label": t("create.settings"),
      on: {
        submit(event) {
          event.preventDefault();
          submit();
        },
      },
    },
    h(
      "div",
      { class: "fields" },
      h("div", { class: "group" }, modelField.element, licence, notice),
      h(
        "div",
        { class: "group" },
        labelled("prompt", t("prompt.label"), prompt),
        promptFault.element,
        negativeField,
        video?.end,
      ),
      video?.start,
      shape.element,
      video?.length,
      loraPicker.element,
      controlPictures.element,
      settings,
    ),
    h("div", { class: "send" }, generate),
  );

  /** What stands in the form now. @returns {FormValues} */
  function read() {
    return {
      model: modelField.get(),
      prompt: prompt.value,
      negativePrompt: negative.value,
      width: Number(width.value),
      height: Number(height.value),
      steps: stepsChosen,
      guidance: guidanceChosen,
      seed: seed.value.trim(),
      images: Number(images.get() ?? 1),
      format: format.get(),
      scheduler: scheduler.get(),
      controls: controlPictures.get(),
      loras: loraPicker.get(),
      refiner: refiner.checked,
      video: video?.get() ?? null,
    };
  }

  function submit() {
    if (model === null) return;
    const form = read();
    if (form.prompt.trim() === "") promptFault.show([t(words.promptEmpty)]);
    checkSize();
    checkSeed();
    video?.check();
    const wrong = element.querySelector('[aria-invalid="true"]');
    if (wrong instanceof HTMLElement) reveal(wrong);
    else onSubmit(form, model);
  }

  /** Writes a form into the controls; the model decides which of them are there. @param {FormValues} form */
  function write(form) {
    const chosen = models.find((known) => known.id === form.model) ?? models[0];
    if (chosen === undefined) return;
    model = chosen;
    stepsChosen = form.steps;
    guidanceChosen = form.guidance;
    modelField.set(chosen.id);
    if (prompt.value !== form.prompt) prompt.value = form.prompt;
    if (negative.value !== form.negativePrompt) negative.value = form.negativePrompt;
    prompt.maxLength = chosen.maxPromptChars;
    negative.maxLength = chosen.maxPromptChars;
    negativeField.hidden = !chosen.negativePrompt;
    shape.offer(
      shapes(chosen.sizes).map((offer) => ({ value: offer.name, content: [shapeMark(offer), offer.name] })),
    );
    for (const side of [width, height]) {
      side.min = String(chosen.sizes.min);
      side.max = String(chosen.sizes.max);
      side.step = String(chosen.sizes.multiple);
    }
    setSize(form.width, form.height);
    video?.set(chosen, form.video ?? NO_VIDEO_VALUES);
    steps.element.hidden = isFixed(chosen.steps);
    steps.set(within(form.steps, chosen.steps), chosen.steps);
    guidance.element.hidden = isFixed(chosen.guidance);
    guidance.set(within(form.guidance, chosen.guidance), chosen.guidance);
    images.element.hidden = chosen.maxImages < 2;
    const counts = Array.from({ length: Math.min(chosen.maxImages, 8) }, (_, index) => String(index + 1));
    images.offer(counts.map((count) => ({ value: count, content: [count] })));
    images.set(String(Math.min(form.images, counts.length)));
    seed.value = form.seed;
    format.set(form.format);
    scheduler.element.hidden = chosen.schedulers.length < 2;
    scheduler.offer(chosen.schedulers.map((name) => ({ value: name, words: name })));
    scheduler.set(chosen.schedulers.includes(form.scheduler) ? form.scheduler : "auto");
    controlPictures.offer(chosen.controls);
    controlPictures.set(form.controls);
    loraPicker.offer(fittingLoras(loras, chosen), chosen.maxLoras);
    loraPicker.set(form.loras);
    refinerField.hidden = chosen.refiner === null;
    refiner.checked = form.refiner;
    for (const each of [promptFault, seedFault]) each.show(null);
    checkSeed();
    showModel(chosen);
  }

  /** @param {Model} chosen */
  function showModel(chosen) {
    const known = STATES[chosen.state];
    state.dataset.tone = known?.tone ?? "idle";
    setText(state, known ? t(known.key) : chosen.state.replaceAll("_", " "));
    const terms = chosen.licence;
    licence.hidden = terms.commercial && terms.attribution === "";
    const parts = [
      t("model.licence", { name: terms.name }),
      terms.commercial ? "" : t("model.nonCommercial"),
      terms.attribution,
    ];
    setText(licence, parts.filter((part) => part !== "").join(" · "));
    const words = stepsNotice(chosen, stepsChosen);
    notice.hidden = words === null;
    if (words !== null) fill(notice, icon("info"), h("span", {}, translate(words)));
  }

  function pickModel() {
    const to = models.find((known) => known.id === modelField.get());
    if (model === null || to === undefined) return;
    write(changedModel(read(), model, to));
    changed();
  }

  /** @param {string} name */
  function pickShape(name) {
    const chosen = model && shapes(model.sizes).find((offer) => offer.name === name);
    if (!chosen) return;
    setSize(chosen.width, chosen.height);
    changed();
  }

  function sizeTyped() {
    showSize();
    if (sizeProblem.shown()) checkSize();
    changed();
  }

  /**
   * @param {number} w
   * @param {number} h
   */
  function setSize(w, h) {
    width.value = String(w);
    height.value = String(h);
    showSize();
    checkSize();
  }

  function showSize() {
    const [w, h] = [Number(width.value), Number(height.value)];
    setText(sizeWords, t("size.value", { width: w, height: h }));
    video?.setSize(w, h);
    shape.set(
      model && (shapes(model.sizes).find((offer) => offer.width === w && offer.height === h)?.name ?? null),
    );
  }

  function checkSize() {
    const wrong = model && sizeFault(Number(width.value), Number(height.value), model.sizes);
    if (!wrong) {
      sizeProblem.show(null);
      return;
    }
    const use = h("button", { type: "button", class: "link" }, t("size.use", wrong.fix));
    use.addEventListener("click", () => {
      setSize(wrong.fix.width, wrong.fix.height);
      width.focus();
      changed();
    });
    sizeProblem.show([translate(wrong.text), " ", use]);
  }

  function checkSeed() {
    clearSeed.hidden = seed.value === "";
    seedFault.show(seedIsValid(seed.value.trim()) ? null : [t("seed.wrong")]);
  }

  /** @param {string} value */
  function setSeed(value) {
    seed.value = value;
    checkSeed();
    seed.focus();
    changed();
  }

  /** The control of a field of the API, where the form has it. */
  const controls = /** @type {Readonly<Record<string, HTMLElement>>} */ ({
    model: modelField.input,
    prompt,
    negative_prompt: negative,
    width,
    height,
    seed,
    controls: controlPictures.input,
    loras: loraPicker.input,
    refiner,
    ...video?.controls,
  });
  /** `controls.1.image` is a part of `controls`. @param {string} param */
  const controlOf = (param) => controls[param.split(".", 1)[0] ?? ""];

  return {
    element,
    read,
    submit,
    /** @param {FormValues} form */
    write(form) {
      write(form);
      changed();
    },
    model: () => model,
    /**
     * Offers these models and fills the form, or only refreshes their states.
     * @param {Model[]} offered
     * @param {Partial<FormValues>} draft
     */
    offer(offered, draft) {
      models = offered;
      modelField.offer(offered.map((each) => ({ value: each.id, words: each.name })));
      const first =
        offered.find((each) => each.id === draft.model) ??
        offered.find((each) => each.state === "ready") ??
        offered[0];
      if (first === undefined) return;
      const typed = prompt.value === "" ? {} : { prompt: prompt.value }; // while the models were on their way
      write({ ...blank(first, FORMATS[kind][0]?.value ?? ""), ...draft, ...typed, model: first.id });
      for (const part of needModel) part.inert = false;
      generate.disabled = false;
    },
    /** @param {import("../types.js").Lora[]} offered */
    offerLoras(offered) {
      loras = offered;
      if (model !== null) loraPicker.offer(fittingLoras(loras, model), model.maxLoras);
    },
    /** @param {Model[]} offered */
    refresh(offered) {
      models = offered;
      model = offered.find((each) => each.id === model?.id) ?? model;
      if (model !== null) showModel(model);
    },
    /** Whether the form has a control for a field of the API. @param {string | null} param */
    has: (param) => param !== null && controlOf(param) !== undefined,
    /** @param {string} param */
    focus(param) {
      const control = controlOf(param);
      if (control !== undefined) reveal(control);
    },
  };
}

/**
 * @param {Model} model
 * @param {string} format
 * @returns {FormValues}
 */
function blank(model, format) {
  return {
    model: model.id,
    prompt: "",
    negativePrompt: "",
    width: model.sizes.width,
    height: model.sizes.height,
    steps: null,
    guidance: null,
    seed: "",
    images: 1,
    format,
    scheduler: "auto",
    controls: [],
    loras: [],
    refiner: false,
    video: null,
  };
}

/** @param {HTMLElement} control */
function reveal(control) {
  control.closest("details")?.setAttribute("open", "");
  control.focus();
}

/**
 * @param {string} id
 * @param {string} label
 * @param {HTMLElement} control
 */
function labelled(id, label, control) {
  return h("div", { class: "field" }, h("label", { for: id }, label), control);
}

/**
 * @param {string} id
 * @param {() => void} onInput
 */
function number(id, onInput) {
  return h("input", { id, type: "number", inputmode: "numeric", required: true, on: { input: onInput } });
}

/**
 * @param {string} name
 * @param {string} words
 * @param {() => void} run
 */
function tool(name, words, run) {
  return h(
    "button",
    { type: "button", class: "quiet", "aria-label": words, title: words, on: { click: run } },
    icon(name),
  );
}

/** @param {{ across: number, down: number }} shape */
function shapeMark({ across, down }) {
  const mark = h("span", { class: "shape-mark", "aria-hidden": "true" });
  setVar(mark, "--ratio", across / down);
  return mark;
}
