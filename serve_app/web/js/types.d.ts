// The page's own shapes. What the API sends is turned into these in wire.js and nowhere else.

export type TextKey = keyof typeof import("../locales/en.json");
export type TextParams = Record<string, string | number>;
/** A text of the page: its key and the values of its {placeholders}. */
export interface Text {
  key: TextKey;
  params?: TextParams;
}

export interface Range {
  min: number;
  default: number;
  max: number;
}

export interface Sizes {
  width: number; // the default, in pixels
  height: number;
  multiple: number;
  min: number;
  max: number;
  maxPixels: number;
  maxAspect: number; // longer side over shorter side
}

/** Which videos a model may be asked for. */
export interface VideoLimits {
  frames: Range; // of any video; each number is a multiple of `every`, plus 1
  every: number;
  fps: number; // the default
  maxFramePixels: number; // width x height x frames
  framewise: boolean; // a picture model: every frame is a picture between the first and the last
}

/** One kind of control picture that a model takes. */
export interface ControlKind {
  type: string;
  plainPictures: boolean; // false: only finished control maps
}

/** A picture whose edges, depth or pose the result follows. */
export interface ControlPicture {
  image: string; // a data: address
  type: string;
  weight: number;
}

/** A LoRA that a request may name. */
export interface Lora {
  id: string; // SHA-256 of its file
  name: string;
  family: string; // of the models it fits; "unknown" fits all
  model: string | null; // the only model it is for
  triggerWords: string[];
  description: string;
}

/** A LoRA in the form, or of a job. */
export interface LoraChoice {
  id: string;
  name: string;
  weight: number;
}

export interface Model {
  id: string;
  name: string;
  family: string;
  description: string;
  tasks: string[];
  steps: Range;
  guidance: Range;
  sizes: Sizes;
  videoLimits: VideoLimits | null; // null: it makes no videos
  strength: number; // default for a picture to start from
  negativePrompt: boolean;
  maxImages: number;
  maxPromptChars: number;
  schedulers: string[];
  controls: ControlKind[];
  maxLoras: number; // at once; 0: it takes none
  refiner: string | null; // the model that makes the last steps when asked to
  licence: { name: string; url: string; attribution: string; commercial: boolean };
  state: string; // "ready", "loading", ... ; an unknown word is shown as it is
}

export type JobStatus = "queued" | "processing" | "completed" | "failed" | "cancelled";

export interface Warning {
  code: string;
  param: string;
  message: string;
}

/** Why something failed: a code of the error tree, and the server's own words. */
export interface Problem {
  code: string;
  message: string;
  param: string | null;
  retryAfterS: number | null;
}

export interface Picture {
  index: number;
  url: string; // relative to the API
  thumbnailUrl: string | null;
  posterUrl: string | null; // of a video: its first frame
  sheetUrl: string | null; // of a video: some of its frames in rows
  width: number;
  height: number;
  seed: string; // decimal digits: seeds are 63-bit, a JS number is not
  mediaType: string;
}

/** What a job makes; also the last part of the address it is asked for at. */
export type Kind = "image" | "video";

/** What was asked for, after the server filled the blanks. */
export interface JobRequest {
  model: string;
  task: string;
  prompt: string;
  negativePrompt: string;
  width: number;
  height: number;
  steps: number;
  guidance: number;
  seed: string;
  images: number;
  format: string;
  scheduler: string;
  loras: LoraChoice[];
  controls: number; // number of control pictures; the record does not contain them
  refiner: boolean;
  strength: number | null; // of a picture it starts from
  video: JobVideo | null;
}

/** The video of a job. */
export interface JobVideo extends CameraMove {
  frames: number;
  fps: number;
  seconds: number;
  framewise: boolean;
}

/** How the view of a frame-wise video moves from its first frame to its last; null: not at all. */
export interface CameraMove {
  zoom: number | null; // 2 sees half of the width
  panX: number | null; // in widths of the picture, to the right
  panY: number | null; // in heights, down
}

/** How far a part of the work on a video is, in frames. */
export interface FrameProgress {
  done: number;
  total: number;
}

export interface Job {
  id: string;
  kind: Kind;
  status: JobStatus;
  ahead: number | null; // jobs before this one
  step: number;
  steps: number; // 0 before the first step is known
  percent: number;
  cancelRequested: boolean;
  request: JobRequest;
  pictures: Picture[];
  warnings: Warning[];
  problem: Problem | null;
  createdAt: number; // unix seconds
  generationS: number | null;
  preview: string | null; // data: address of the latest preview
  decode: FrameProgress | null; // of a video, after its last step; the two overlap
  encode: FrameProgress | null;
  firstStepAt: number | null; // ms of performance.now(), for the time left
  lastStepAt: number | null;
  firstStep: number; // the step `firstStepAt` belongs to
}

/** What stands in the form. `null` means: the person has not chosen, the model's default counts. */
export interface FormValues {
  model: string;
  prompt: string;
  negativePrompt: string;
  width: number;
  height: number;
  steps: number | null;
  guidance: number | null;
  seed: string; // "" asks for a random one
  images: number;
  format: string;
  scheduler: string;
  controls: ControlPicture[];
  loras: LoraChoice[];
  refiner: boolean;
  video: VideoValues | null; // null: a form for pictures
}

/** What stands in the form for a video only. */
export interface VideoValues extends CameraMove {
  frames: number | null;
  fps: number | null;
  image: string | null; // a data: address of the picture it begins with
  strength: number | null;
  endPrompt: string;
  endSeed: string; // "" leaves it to the service
}

export interface SizeFault {
  text: Text;
  fix: { width: number; height: number };
}

export interface SseEvent {
  id: string;
  type: string;
  data: string;
}

/** One event of a job's event stream. */
export type JobEvent =
  | { type: "queued"; ahead: number | null; step: number; percent: number | null }
  | { type: "started"; step: number; steps: number | null; percent: number | null }
  | { type: "step"; step: number; steps: number; percent: number | null }
  | { type: "preview"; data: string; mediaType: string }
  | { type: "stage"; stage: "decode" | "encode"; done: number; total: number; percent: number | null }
  | { type: "failed"; problem: Problem }
  | { type: "completed" }
  | { type: "cancelled" };

export interface Submitted {
  id: string;
  status: JobStatus;
  warnings: Warning[];
}

export interface Api {
  models(): Promise<Model[]>;
  loras(): Promise<Lora[]>;
  /** Registers the file as the caller's own. */
  addLora(file: File): Promise<Lora>;
  /** The same key within a day gives the job of the first call. */
  generate(body: object, kind: Kind, idempotencyKey: string): Promise<Submitted>;
  job(id: string): Promise<Job>;
  jobs(limit: number, kind?: Kind): Promise<Job[]>;
  cancel(id: string): Promise<void>;
  /** The open event stream of a job, after the event `lastId`. */
  events(id: string, lastId: string | null, signal: AbortSignal): Promise<Response>;
  /** Ends the session that a key was traded for. */
  logOut(): Promise<void>;
  /** The full address of a link that the API gave. */
  address(url: string): string;
  blob(url: string): Promise<Blob>;
}

export interface Signal<T> {
  get(): T;
  set(value: T): void;
  /** Calls `listener` now and after every change, until the returned function is called. */
  subscribe(listener: (value: T) => void): () => void;
}
