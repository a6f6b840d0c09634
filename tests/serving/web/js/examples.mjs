// Models and jobs that the tests talk about, as the page holds them.

export const FLUX = {
  id: "flux-schnell",
  name: "FLUX.1 [schnell]",
  family: "flux",
  description: "",
  tasks: ["t2i"],
  steps: { min: 4, default: 4, max: 4 },
  guidance: { min: 0, default: 0, max: 0 },
  sizes: { width: 1024, height: 1024, multiple: 16, min: 256, max: 2048, maxPixels: 4_194_304, maxAspect: 3 },
  videoLimits: null,
  strength: 0.8,
  negativePrompt: false,
  maxImages: 4,
  maxPromptChars: 4000,
  schedulers: ["auto"],
  controls: [],
  maxLoras: 0,
  refiner: null,
  licence: { name: "Apache-2.0", url: "", attribution: "", commercial: true },
  state: "ready",
};

export const SDXL = {
  ...FLUX,
  id: "sdxl",
  family: "sdxl",
  steps: { min: 1, default: 30, max: 80 },
  guidance: { min: 0, default: 5, max: 15 },
  sizes: { ...FLUX.sizes, multiple: 8 },
  negativePrompt: true,
  schedulers: ["auto", "euler"],
  controls: [
    { type: "canny", plainPictures: true },
    { type: "depth", plainPictures: false },
  ],
  maxLoras: 2,
  refiner: "sdxl-refiner",
};

export const TINY = {
  ...FLUX,
  id: "tiny",
  sizes: { width: 128, height: 128, multiple: 16, min: 64, max: 256, maxPixels: 65_536, maxAspect: 3 },
};

/** A video model: numbers of frames are a multiple of 4, plus 1. */
export const WAN = {
  ...SDXL,
  id: "wan",
  family: "wan",
  tasks: ["t2v"],
  sizes: { width: 64, height: 64, multiple: 16, min: 64, max: 128, maxPixels: 16_384, maxAspect: 2 },
  videoLimits: {
    frames: { min: 1, default: 17, max: 129 },
    every: 4,
    fps: 8,
    maxFramePixels: 129 * 64 * 64,
    framewise: false,
  },
};

/** A picture model that makes videos frame by frame. */
export const FRAMEWISE = {
  ...WAN,
  id: "framewise",
  family: "sd",
  tasks: ["t2i", "i2i", "t2v", "i2v"],
  videoLimits: { ...WAN.videoLimits, frames: { min: 1, default: 16, max: 64 }, every: 1, framewise: true },
};

export const FORM = {
  model: "sdxl",
  prompt: " a red fox ",
  negativePrompt: " snow ",
  width: 1024,
  height: 1024,
  steps: null,
  guidance: null,
  seed: "",
  images: 1,
  format: "png",
  scheduler: "auto",
  controls: [],
  loras: [],
  refiner: false,
  video: null,
};

export const INK = {
  id: "1".repeat(64),
  name: "ink",
  family: "sdxl",
  model: null,
  triggerWords: ["inky"],
  description: "",
};

export const JOB = {
  id: "a".repeat(32),
  kind: "image",
  status: "queued",
  ahead: null,
  step: 0,
  steps: 0,
  percent: 0,
  cancelRequested: false,
  request: {
    ...FORM,
    task: "t2i",
    prompt: "a red fox",
    negativePrompt: "",
    steps: 4,
    guidance: 0,
    seed: "7",
    controls: 0,
    strength: null,
  },
  pictures: [],
  warnings: [],
  problem: null,
  createdAt: 1_700_000_000,
  generationS: null,
  preview: null,
  decode: null,
  encode: null,
  firstStep: 0,
  firstStepAt: null,
  lastStepAt: null,
};
