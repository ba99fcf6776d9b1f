// The board: strokes or an image, by mouse, finger, pen and keys, and the pixels that a network gets of it.

const SOURCE = 280;  // side of the drawing that pixels are made of
const STEP = 1 / 56;  // of the keyboard's cursor

export class Board extends EventTarget {
  constructor(canvas) {
    super();
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.source = new OffscreenCanvas(SOURCE, SOURCE);
    this.strokes = [];
    this.image = null;
    this.isExample = false;
    this.pen = .08;
    this.settings = {rotate: 0, right: 0, down: 0, size: 1, fit: true, invert: false};
    this.cursor = [.5, .5];
    this.isDown = false;
    this.pointer = null;
    canvas.addEventListener("pointerdown", event => this.begin(event));
    canvas.addEventListener("pointermove", event => this.move(event));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, event => this.end(event));
    canvas.addEventListener("keydown", event => this.press(event));
    for (const name of ["focus", "blur"]) canvas.addEventListener(name, () => this.lift());
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  }

  begin(event) {
    if (event.button) return;
    event.preventDefault();
    if (this.pointer !== null) return;  // a second finger, or the palm
    this.canvas.focus({preventScroll: true, focusVisible: false});
    try {
      this.canvas.setPointerCapture(event.pointerId);
      this.pointer = event.pointerId;
    } catch {}  // of a pointer that is already gone
    this.stroke = this.add(this.place(event));
  }

  move(event) {
    if (!this.stroke || event.pointerId !== this.pointer) return;
    // Browsers join the points of a frame into one event.
    const events = event.getCoalescedEvents?.() ?? [];
    for (const part of events.length ? events : [event]) this.stroke.points.push(this.place(part));
    this.changed();
  }

  end(event) {
    if (event.pointerId !== this.pointer) return;
    this.pointer = this.stroke = null;
  }

  add(point) {
    if (this.isExample || this.image) this.empty();
    this.strokes.push({points: [point], width: this.pen});
    this.changed();
    return this.strokes.at(-1);
  }

  press(event) {
    const step = event.shiftKey ? 4 * STEP : STEP;
    const ways = {ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step]};
    if (event.key in ways) {
      this.cursor = this.cursor.map((value, axis) => Math.min(1, Math.max(0, value + ways[event.key][axis])));
      if (this.isDown) this.stroke.points.push(this.cursor);
    } else if (event.key === " ") {
      if (this.isDown) {
        this.lift();
      } else {
        this.stroke = this.add(this.cursor);
        this.isDown = true;
      }
    } else if (event.key === "Delete" || event.key === "Backspace") {
      this.clear();
    } else if (event.key === "z" && (event.ctrlKey || event.metaKey)) {
      this.undo();
    } else {
      return;
    }
    event.preventDefault();
    this.hasCursor = true;
    this.changed();
  }

  lift() {
    this.isDown = this.hasCursor = false;
    this.stroke = null;
    this.paint();
  }

  get isBlank() {
    return !this.image && !this.strokes.length;
  }

  empty() {
    this.strokes = [];
    this.image = null;
    this.isExample = this.isDown = false;
    this.stroke = null;
  }

  clear() {
    this.empty();
    this.changed();
  }

  undo() {
    if (this.isExample || this.image) this.empty();
    this.strokes.pop();
    this.isDown = false;
    this.stroke = null;
    this.changed();
  }

  showExample(strokes) {
    this.empty();
    this.strokes = strokes.map(points => ({points, width: .08}));
    this.isExample = true;
    this.changed();
  }

  // Open an image file; whether its border is light, as that of a photographed page.
  async open(file) {
    const image = await createImageBitmap(file);
    this.empty();
    this.image = image;
    const small = new OffscreenCanvas(16, 16).getContext("2d");
    small.drawImage(image, 0, 0, 16, 16);
    const {data} = small.getImageData(0, 0, 16, 16);
    let sum = 0, count = 0;
    for (let y = 0; y < 16; y++) for (let x = 0; x < 16; x++) {
      if (x % 15 && y % 15) continue;
      const first = 4 * (16 * y + x);
      sum += (data[first] + data[first + 1] + data[first + 2]) / 3 * data[first + 3] / 255;
      count++;
    }
    return sum / count > 127;
  }

  changed() {
    this.paint();
    this.dispatchEvent(new Event("change"));
  }

  paint() {
    const side = this.canvas.width, context = this.context;
    context.fillStyle = "#000";
    context.fillRect(0, 0, side, side);
    if (this.image) {  // in its own proportions; networks get it in theirs
      const {width, height} = this.image, scale = side / Math.max(width, height);
      const w = width * scale, h = height * scale;
      this.drawImage(context, (side - w) / 2, (side - h) / 2, w, h, scale > 1);
    } else {
      this.drawStrokes(context, side);
    }
    if (this.hasCursor) {
      context.strokeStyle = this.isDown ? "#ffb300" : "#6db3e8";
      context.lineWidth = 3;
      context.beginPath();
      context.arc(this.cursor[0] * side, this.cursor[1] * side, Math.max(8, this.pen * side / 2), 0, 7);
      context.stroke();
    }
  }

  drawImage(context, x, y, width, height, isCoarse) {
    context.imageSmoothingEnabled = !isCoarse;
    context.imageSmoothingQuality = "high";
    context.drawImage(this.image, x, y, width, height);
    if (!this.settings.invert) return;
    context.globalCompositeOperation = "difference";  // to white
    context.fillStyle = "#fff";
    context.fillRect(x, y, width, height);
    context.globalCompositeOperation = "source-over";
  }

  drawStrokes(context, side) {
    context.strokeStyle = context.fillStyle = "#fff";
    context.lineCap = context.lineJoin = "round";
    for (const {points, width} of this.strokes) {
      const at = points.map(([x, y]) => [x * side, y * side]);
      context.lineWidth = width * side;
      context.beginPath();
      context.moveTo(...at[0]);
      for (let i = 1; i < at.length - 1; i++) {  // curves through the middles of the lines between points
        context.quadraticCurveTo(...at[i], (at[i][0] + at[i + 1][0]) / 2, (at[i][1] + at[i + 1][1]) / 2);
      }
      context.lineTo(...at.at(-1));
      context.stroke();
    }
  }

  // Scale and middle of a drawing by which it fills 20 of 28 pixels around its centre of mass, as digits of MNIST do.
  fitting() {
    if (this.image || !this.settings.fit || !this.strokes.length) return {scale: 1, x: .5, y: .5};
    const context = this.source.getContext("2d", {willReadFrequently: true});
    context.clearRect(0, 0, SOURCE, SOURCE);
    this.drawStrokes(context, SOURCE);
    const {data} = context.getImageData(0, 0, SOURCE, SOURCE);
    let left = SOURCE, right = -1, top = SOURCE, bottom = -1, mass = 0, sumX = 0, sumY = 0;
    for (let y = 0; y < SOURCE; y++) for (let x = 0; x < SOURCE; x++) {
      const ink = data[4 * (SOURCE * y + x) + 3];
      if (ink < 32) continue;
      left = Math.min(left, x);
      right = Math.max(right, x);
      top = Math.min(top, y);
      bottom = Math.max(bottom, y);
      mass += ink;
      sumX += ink * (x + .5);
      sumY += ink * (y + .5);
    }
    if (!mass) return {scale: 1, x: .5, y: .5};
    const longest = Math.max(right - left, bottom - top) + 1;
    return {scale: 20 / 28 * SOURCE / Math.max(longest, SOURCE / 8), x: sumX / mass / SOURCE, y: sumY / mass / SOURCE};
  }

  // Whole numbers from 0 to 255, by channel, then row by row: the drawing fitted, turned, resized and shifted. An image
  // is stretched to the network's pixels, as its training images were; a drawing fills their middle square.
  pixels([channels, height, width]) {
    const over = Math.max(height, width) > 64 ? 2 : 4;  // samples of a pixel each way, of which it is the mean
    const work = new OffscreenCanvas(over * width, over * height), side = Math.min(work.width, work.height);
    const context = work.getContext("2d", {willReadFrequently: true});
    context.fillStyle = "#000";
    context.fillRect(0, 0, work.width, work.height);
    const {rotate, right, down, size} = this.settings, {scale, x, y} = this.fitting();
    context.translate((.5 + right) * work.width, (.5 + down) * work.height);
    context.rotate(rotate * Math.PI / 180);
    context.scale(scale * size, scale * size);
    if (this.image) {
      const isCoarse = this.image.width <= work.width && this.image.height <= work.height;
      this.drawImage(context, -work.width / 2, -work.height / 2, work.width, work.height, isCoarse);
    } else {
      context.translate(-x * side, -y * side);
      this.drawStrokes(context, side);
    }
    const {data} = context.getImageData(0, 0, work.width, work.height);
    const pixels = new Uint8Array(channels * height * width);
    for (let row = 0; row < height; row++) for (let column = 0; column < width; column++) {
      const sums = [0, 0, 0];
      for (let i = 0; i < over; i++) for (let j = 0; j < over; j++) {
        const first = 4 * ((over * row + i) * work.width + over * column + j);
        for (let c = 0; c < 3; c++) sums[c] += data[first + c];
      }
      const values = channels === 3 ? sums : [.299 * sums[0] + .587 * sums[1] + .114 * sums[2]];
      values.forEach((sum, c) => {
        pixels[(c * height + row) * width + column] = Math.min(255, Math.round(sum / over ** 2));
      });
    }
    return pixels;
  }
}
