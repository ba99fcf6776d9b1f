// The engine of the served page: the server computes.
import {start} from "./page.js";

class HttpEngine {
  async models() {
    return (await fetch("models.json")).json();
  }

  look(model, pixels, target) {
    return this.ask("api/look", {model, pixels: Array.from(pixels), target});
  }

  draw(model, capsules, target) {
    return this.ask("api/draw", {model, capsules: Array.from(capsules), target});
  }

  async ask(path, values) {
    let answer;
    try {
      answer = await fetch(path, {
        method: "POST",
        headers: {"Content-Type": "application/json"},
        body: JSON.stringify(values),
      });
    } catch {
      throw new Error("The server does not answer: start it again, then reload this page.");
    }
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    return found;
  }
}

start(new HttpEngine());
