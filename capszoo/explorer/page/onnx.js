// The engine of the static page: ONNX Runtime Web computes in the browser.
import * as ort from "./onnxruntime/ort.js";
import {start} from "./page.js";

const beside = name => new URL(name, import.meta.url);

class OnnxEngine {
  constructor() {
    this.sessions = new Map();
    this.last = Promise.resolve();
  }

  async models() {
    const wasm = await fetch(beside("onnxruntime/ort.wasm"));
    if (!wasm.ok) throw new Error("onnxruntime/ort.wasm is missing: put the whole folder on the host.");
    // Given as bytes: not every host says that it is WebAssembly. More threads need headers that few hosts send.
    ort.env.wasm.wasmBinary = await wasm.arrayBuffer();
    ort.env.wasm.numThreads = 1;
    ort.env.logLevel = "error";
    this.described = await (await fetch(beside("models.json"))).json();
    return this.described;
  }

  look(model, pixels, target) {
    return this.inTurn(async () => {
      const about = this.described[model];
      const [, height, width] = about.shape, classes = about.classes.length;
      const x = Float32Array.from(pixels, value => value / 255);
      const found = await this.run(about.look, {
        pixels: new ort.Tensor("float32", x, [1, about.shape[0], height, width]),
      });
      const scores = Array.from(found.scores.data);
      const answer = {scores, target: target ?? scores.indexOf(Math.max(...scores))};
      if (found.capsules) {
        answer.capsules = Array.from(found.capsules.data);
        answer.drawn = about.draw ? await this.drawNow(about, answer.capsules, answer.target) : null;
      }
      if (found.shares) {
        const [iterations, , places] = found.shares.dims, data = found.shares.data;
        answer.shares = Array.from({length: iterations}, (_, r) => Array.from({length: places}, (_, p) => {
          const first = (r * places + p) * classes;
          return Array.from(data.subarray(first, first + classes));
        }));
        answer.presence = Array.from(found.presence.data);
      }
      return answer;
    });
  }

  draw(model, capsules, target) {
    const about = this.described[model];
    return this.inTurn(async () => ({drawn: await this.drawNow(about, capsules, target)}));
  }

  async drawNow(about, capsules, target) {
    const found = await this.run(about.draw, {
      capsules: new ort.Tensor("float32", Float32Array.from(capsules), [1, about.classes.length, about.dims]),
      target: new ort.Tensor("int64", BigInt64Array.of(BigInt(target)), [1]),
    });
    return Array.from(found.drawn.data, value => Math.round(255 * value));
  }

  async run(name, inputs) {
    if (!this.sessions.has(name)) {
      const file = await fetch(beside(`models/${name}`));
      if (!file.ok) throw new Error(`models/${name} is missing: put the whole folder on the host.`);
      const graph = new Uint8Array(await file.arrayBuffer());
      this.sessions.set(name, await ort.InferenceSession.create(graph, {executionProviders: ["wasm"]}));
    }
    return this.sessions.get(name).run(inputs);
  }

  // A session runs one input at a time.
  inTurn(job) {
    const result = this.last.then(job);
    this.last = result.catch(() => {});
    return result;
  }
}

start(new OnnxEngine());
