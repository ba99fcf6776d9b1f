// One network: its classes, pictures, couplings, and the numbers of a class capsule.
import {EVEN, drawLines, excesses} from "./couplings.js";

const MOST_ROWS = 12;

const make = (name, attributes = {}, ...children) => {
  const element = Object.assign(document.createElement(name), attributes);
  element.append(...children);
  return element;
};
const norm = values => Math.hypot(...values);

// Paint numbers from 0 to 255, by channel, then row by row.
function paint(canvas, pixels, [channels, height, width]) {
  canvas.width = width;
  canvas.height = height;
  canvas.style.aspectRatio = `${width} / ${height}`;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height), size = width * height;
  for (let i = 0; i < size; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = pixels[channels === 3 ? c * size + i : i];
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

export class Panel {
  // say: takes what the network says of an image, in words; fail: takes an error.
  constructor(engine, models, index, {say, fail}) {
    Object.assign(this, {engine, models, say, fail});
    this.root = document.getElementById("panel").content.firstElementChild.cloneNode(true);
    const find = name => this.root.querySelector(name);
    this.parts = {
      select: find(".head select"), facts: find(".facts"), seen: find(".seen"), drawn: find(".drawn"),
      caption: find(".has-drawn figcaption"), drawnFigure: find(".has-drawn"), column: find(".column"),
      classes: find(".classes"), lines: find(".lines"), figure: find(".figure"), iterations: find(".iterations"),
      radios: find(".radios"), note: find(".couplings-note"), capsule: find(".capsule"), summary: find("summary"),
      target: find(".target"), reset: find(".reset"), numbers: find(".numbers"),
    };
    models.forEach((model, i) => this.parts.select.append(make("option", {value: i, textContent: model.name})));
    this.parts.select.addEventListener("change", () => this.choose(+this.parts.select.value));
    this.parts.reset.addEventListener("click", () => this.resetNumbers());
    this.parts.target.addEventListener("change", () => this.pin(+this.parts.target.value));
    new ResizeObserver(() => this.drawCouplings()).observe(this.parts.figure);
    this.choose(index);
  }

  choose(index) {
    this.index = index;
    const model = this.model = this.models[index], parts = this.parts;
    parts.select.value = index;
    this.root.setAttribute("aria-label", model.name);
    parts.facts.textContent = `${model.parameters.toLocaleString("en")} parameters`
      + (model.dataset ? `, trained on ${model.dataset}` : "");
    parts.drawnFigure.hidden = !model.draws;
    parts.capsule.hidden = !model.draws;
    this.pinned = this.answer = null;
    this.iteration = -1;
    parts.radios.replaceChildren();
    parts.iterations.hidden = true;
    parts.note.textContent = model.dims && !model.centers.length
      ? "No lines: the capsules of this network have no place in the image, or this page has no couplings of it." : "";
    parts.target.replaceChildren(...model.classes.map((name, j) => make("option", {value: j, textContent: name})));
    const rows = Math.min(model.classes.length, MOST_ROWS);
    this.rows = Array.from({length: rows}, () => {
      const fill = make("i"), name = make("span", {className: "name"}), length = make("span", {className: "length"});
      const button = make("button", {type: "button"}, name, make("span", {className: "bar"}, fill), length);
      button.addEventListener("click", () => this.pin(+button.dataset.class));
      return {button, fill, name, length};
    });
    parts.classes.replaceChildren(...this.rows.map(row => make("li", {}, row.button)));
    this.sliders = Array.from({length: model.draws ? model.dims : 0}, (_, d) => {
      const input = make("input", {type: "range", step: "0.005"}), value = make("output");
      const label = make("label", {}, make("span", {textContent: d}), input, value);
      input.setAttribute("aria-label", `number ${d} of the capsule`);
      input.addEventListener("input", () => this.turn(d, +input.value));
      return {input, value, label};
    });
    parts.numbers.replaceChildren(...this.sliders.map(slider => slider.label));
    this.board && this.update(this.board);
  }

  // A click on a class looks at its capsule; another lets the longest be looked at again.
  pin(j) {
    this.pinned = this.pinned === j ? null : j;
    this.board && this.update(this.board);
  }

  // Look at what is on the board. While an image is looked at, later ones wait; of these the last counts.
  async update(board) {
    this.board = board;
    this.isStale = true;
    if (this.isBusy) return;
    this.isBusy = true;
    try {
      while (this.isStale) {
        this.isStale = false;
        const {index, model} = this, pixels = board.pixels(model.shape);
        paint(this.parts.seen, pixels, model.shape);
        const answer = await this.engine.look(index, pixels, this.pinned);
        if (index === this.index) this.show(answer);
      }
      this.fail(null);
    } catch (error) {
      this.fail(error);
    } finally {
      this.isBusy = false;
    }
  }

  show(answer) {
    this.answer = answer;
    const {model, parts} = this, {scores, target} = answer, isBlank = this.board.isBlank;
    this.root.classList.toggle("blank", isBlank);
    parts.column.textContent = isBlank ? "nothing is drawn yet"
      : {length: "length of the capsule"}[model.score] ?? model.score;
    this.best = scores.indexOf(Math.max(...scores));
    let shown = scores.map((_, j) => j);
    if (shown.length > MOST_ROWS) {  // the longest, and always the chosen
      shown = shown.sort((a, b) => scores[b] - scores[a]).slice(0, MOST_ROWS);
      if (!shown.includes(target)) shown[MOST_ROWS - 1] = target;
    }
    this.shown = shown;
    shown.forEach((j, place) => {
      const row = this.rows[place];
      row.button.dataset.class = j;
      row.name.textContent = row.name.title = model.classes[j];
      row.length.textContent = scores[j].toFixed(2);
      row.fill.style.setProperty("--value", Math.min(1, Math.max(0, scores[j])));
      row.button.classList.toggle("best", j === this.best);
      row.button.setAttribute("aria-pressed", j === target);
      row.button.setAttribute("aria-label", `${model.classes[j]}, ${model.score} ${scores[j].toFixed(2)}`);
    });
    parts.seen.setAttribute("aria-label", `The image in ${model.shape[2]} by ${model.shape[1]} pixels`);
    parts.target.value = target;
    this.say(isBlank ? `${model.name}: nothing is drawn yet` : `${model.name}: ${model.classes[this.best]}, ${model.score} ${scores[this.best].toFixed(2)}`);
    if (answer.capsules) this.resetNumbers();
    if (answer.drawn) this.paintDrawn(answer.drawn);
    this.showIterations();
    this.drawCouplings();
  }

  paintDrawn(drawn) {
    const {model, parts, answer} = this, name = model.classes[answer.target];
    paint(parts.drawn, drawn, model.shape);
    const text = `drawn from the capsule of ${name}${this.isEdited ? ", changed" : ""}`;
    parts.caption.textContent = text;
    parts.drawn.setAttribute("aria-label", `Image ${text}`);
  }

  showIterations() {
    const {parts, answer} = this, count = answer.shares?.length ?? 0;
    parts.iterations.hidden = count < 2;
    if (!count) return;
    if (this.iteration < 0 || this.iteration >= count) this.iteration = count - 1;
    if (parts.radios.children.length !== count) {
      this.group = `iteration-${crypto.getRandomValues(new Uint32Array(1))[0]}`;
      parts.radios.replaceChildren(...answer.shares.map((_, r) => {
        const input = make("input", {type: "radio", name: this.group, value: r, checked: r === this.iteration});
        input.addEventListener("change", () => {
          this.iteration = r;
          this.drawCouplings();
        });
        return make("label", {}, input, `${r + 1}`);
      }));
    }
  }

  drawCouplings() {
    const {answer, model, parts} = this;
    parts.lines.hidden = !answer?.shares;
    if (!answer?.shares) return;
    const shares = answer.shares[this.iteration], J = model.classes.length;
    const strengths = excesses(answer.shares, answer.presence, J)[this.iteration];
    const from = parts.figure.getBoundingClientRect(), seen = parts.seen.getBoundingClientRect();
    const [, height, width] = model.shape;
    const starts = model.centers.map(([row, column]) =>
      [seen.left - from.left + column / width * seen.width, seen.top - from.top + row / height * seen.height]);
    const ends = model.classes.map(() => null);
    this.shown.forEach((j, place) => {
      const box = this.rows[place].button.getBoundingClientRect();
      ends[j] = [box.left - from.left, box.top - from.top + box.height / 2];
    });
    const style = getComputedStyle(document.documentElement), color = name => style.getPropertyValue(name).trim();
    const colors = {chosen: answer.target, accent: color("--accent"), soft: color("--soft")};
    drawLines(parts.lines, starts, ends, strengths, answer.presence, colors);
    const largest = Math.max(...shares.flat()), equal = 1 / J;
    parts.note.textContent = largest < EVEN * equal
      ? `Each part divides its vote evenly: ${equal.toFixed(3)} for each class.`
      : `A line is a part's vote beyond an equal share of ${equal.toFixed(3)}; the largest share is ${largest.toFixed(3)}.`;
  }

  resetNumbers() {
    const {answer, model} = this;
    if (!answer?.capsules) return;
    const first = answer.target * model.dims;
    this.numbers = answer.capsules.slice(first, first + model.dims);
    const limit = Math.max(1, Math.ceil(1.5 * Math.max(...this.numbers.map(Math.abs))));
    const wasEdited = this.isEdited;
    this.isEdited = false;
    this.sliders.forEach(({input, label}, d) => {
      input.min = -limit;
      input.max = limit;
      input.value = this.numbers[d];
      label.classList.remove("edited");
    });
    this.showNumbers();
    if (wasEdited && answer.drawn) this.paintDrawn(answer.drawn);
  }

  showNumbers() {
    const {answer, model, parts} = this;
    this.sliders.forEach(({value}, d) => { value.textContent = this.numbers[d].toFixed(3); });
    parts.reset.disabled = !this.isEdited;
    parts.summary.textContent = `Capsule of ${model.classes[answer.target]}: ${model.dims} numbers, `
      + `length ${norm(this.numbers).toFixed(2)}`;
  }

  // A number of the capsule was changed: the reconstruction follows, the last change first.
  async turn(d, value) {
    if (!this.answer?.capsules) return;  // of another network, whose answer is on its way
    this.numbers[d] = value;
    this.isEdited = true;
    this.sliders[d].label.classList.add("edited");
    this.showNumbers();
    this.isTurned = true;
    if (this.isDrawing) return;
    this.isDrawing = true;
    try {
      while (this.isTurned && this.isEdited) {
        this.isTurned = false;
        const {answer, index, model} = this, capsules = answer.capsules.slice();
        capsules.splice(answer.target * model.dims, model.dims, ...this.numbers);
        const {drawn} = await this.engine.draw(index, capsules, answer.target);
        if (answer === this.answer && this.isEdited) this.paintDrawn(drawn);
      }
      this.fail(null);
    } catch (error) {
      this.fail(error);
    } finally {
      this.isDrawing = false;
    }
  }
}
