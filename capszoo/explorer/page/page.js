// The page: the board with its controls, and a panel for each network that is looked at. An engine computes:
//   models()                       what there is, see Network.describe in looking.py
//   look(model, pixels, target)    see Network.look; target null draws the longest capsule
//   draw(model, capsules, target)  see Network.draw
import {DIGITS} from "./digits.js";
import {Board} from "./drawing.js";
import {Panel} from "./panel.js";

const byId = name => document.getElementById(name);

// Errors by what they are of, of which the first is shown.
const problems = new Map();

function fail(source, error) {
  problems.set(source, error?.message);
  const text = [...problems.values()].find(Boolean) ?? "";
  byId("problem").hidden = !text;
  byId("problem").textContent = text;
}

export async function start(engine) {
  try {
    new Page(engine, await engine.models());
  } catch (error) {
    byId("loading")?.remove();
    fail("start", error);
    throw error;
  }
}

class Page {
  constructor(engine, models) {
    Object.assign(this, {engine, models});
    this.said = new Map();
    this.board = new Board(byId("board"));
    this.board.addEventListener("change", () => {
      fail("file", null);
      this.update();
    });
    this.connectButtons();
    this.connectSliders();
    this.connectFiles();
    this.panels = [];
    byId("second-choice").hidden = models.length < 2;
    byId("second").checked = models.length > 1;
    byId("second").addEventListener("change", () => this.arrange());
    this.board.showExample(DIGITS[5]);
    byId("loading").remove();
    this.arrange();
    document.documentElement.dataset.ready = "true";
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.panels.forEach(panel => panel.drawCouplings());
    });
  }

  arrange() {
    const count = byId("second").checked ? 2 : 1;
    while (this.panels.length > count) {
      this.panels.pop().root.remove();
      fail(this.panels.length, null);
    }
    while (this.panels.length < count) {
      const number = this.panels.length;
      const said = {say: text => this.say(number, text), fail: error => fail(number, error)};
      const panel = new Panel(this.engine, this.models, number, said);
      this.panels.push(panel);
      byId("panels").append(panel.root);
      panel.update(this.board);
    }
    byId("panels").classList.toggle("two", count === 2);
  }

  update() {
    this.panels.forEach(panel => panel.update(this.board));
  }

  // For screen readers, once nothing changes.
  say(number, text) {
    this.said.set(number, text);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      byId("said").textContent = [...this.said.values()].slice(0, this.panels.length).join("; ");
    }, 700);
  }

  connectButtons() {
    byId("clear").addEventListener("click", () => this.board.clear());
    byId("undo").addEventListener("click", () => this.board.undo());
    DIGITS.forEach((strokes, digit) => {
      const button = Object.assign(document.createElement("button"), {type: "button", textContent: digit});
      button.setAttribute("aria-label", `Example of the digit ${digit}`);
      button.addEventListener("click", () => this.board.showExample(strokes));
      byId("digits").append(button);
    });
    // On a phone they would stand between the board and what the network says.
    byId("changes").open = !matchMedia("(max-width: 820px)").matches;
    byId("straight").addEventListener("click", () => {
      for (const [name, value] of [["rotate", 0], ["right", 0], ["down", 0], ["size", 100], ["pen", 8]]) {
        byId(name).value = value;
        byId(name).dispatchEvent(new Event("input"));
      }
    });
    for (const name of ["fit", "invert"]) {
      byId(name).addEventListener("change", event => {
        this.board.settings[name] = event.target.checked;
        this.board.changed();
      });
    }
  }

  connectSliders() {
    const settings = this.board.settings;
    const sliders = {
      rotate: [value => { settings.rotate = value; }, "°"],
      right: [value => { settings.right = value / 100; }, " %"],
      down: [value => { settings.down = value / 100; }, " %"],
      size: [value => { settings.size = value / 100; }, " %"],
      pen: [value => { this.board.pen = value / 100; }, " %"],
    };
    for (const [name, [set, unit]] of Object.entries(sliders)) {
      const input = byId(name), output = document.querySelector(`output[for=${name}]`);
      const take = () => {
        set(+input.value);
        output.textContent = input.value + unit;
      };
      input.addEventListener("input", () => {
        take();
        if (name !== "pen") this.update();
      });
      take();  // browsers keep values when a page is loaded again
    }
    for (const name of ["fit", "invert"]) settings[name] = byId(name).checked;
  }

  connectFiles() {
    const open = async file => {
      if (!file) return;
      try {
        const isLight = await this.board.open(file);
        byId("invert").checked = this.board.settings.invert = isLight && this.models.every(model => model.shape[0] === 1);
        this.board.changed();
      } catch {
        fail("file", new Error(`${file.name} is not an image that this browser can open.`));
      }
    };
    byId("file").addEventListener("change", event => {
      open(event.target.files[0]);
      event.target.value = "";  // else the same file could not be opened again
    });
    const board = byId("board");
    addEventListener("dragover", event => {
      event.preventDefault();
      board.classList.add("over");
    });
    for (const name of ["dragleave", "drop"]) addEventListener(name, () => board.classList.remove("over"));
    addEventListener("drop", event => {
      event.preventDefault();
      open(event.dataTransfer.files[0]);
    });
  }
}
