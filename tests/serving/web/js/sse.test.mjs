import assert from "node:assert/strict";
import { test } from "node:test";

import { EventParser, readEvents } from "../../../../serve_app/web/js/sse.js";

const STREAM =
  ': hello\n\nid: 1-0\nevent: queued\ndata: {"position": 1}\n\n' +
  'id: 2-0\r\nevent: step\r\ndata: {"step": 1,\r\ndata:"steps": 4}\r\n\r\n' +
  "data:no space and no name\n\nevent: nothing\n\nid: 3-0\revent: completed\rdata: {}\r\r";

const EVENTS = [
  { id: "1-0", type: "queued", data: '{"position": 1}' },
  { id: "2-0", type: "step", data: '{"step": 1,\n"steps": 4}' },
  { id: "2-0", type: "message", data: "no space and no name" },
  { id: "3-0", type: "completed", data: "{}" },
];

test("a stream gives the same events however it is cut", () => {
  for (const size of [1, 2, 3, 7, 1000]) {
    const parser = new EventParser();
    const events = [];
    for (let at = 0; at < STREAM.length; at += size) events.push(...parser.push(STREAM.slice(at, at + size)));
    events.push(...parser.push("\n")); // what may follow the last CR

    assert.deepEqual(events, EVENTS, `pieces of ${size}`);
  }
});

test("an unfinished event is not emitted", () => {
  assert.deepEqual(new EventParser().push("event: step\ndata: 1\n"), []);
});

test("characters cut in the middle of their bytes arrive whole", async () => {
  const bytes = new TextEncoder().encode("data: Gänse→\n\n");
  const body = new ReadableStream({
    start(controller) {
      for (const byte of bytes) controller.enqueue(new Uint8Array([byte]));
      controller.close();
    },
  });
  let pieces = 0;

  const events = [];
  for await (const event of readEvents(new Response(body), () => pieces++)) events.push(event);

  assert.equal(events[0].data, "Gänse→");
  assert.equal(pieces, bytes.length);
});
