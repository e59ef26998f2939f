// The memory as a line of time: thumbnails, segments, drops, alerts and what the shown answer looked at. Times are milliseconds.
const SECOND = 1000, MINUTE = 60 * SECOND, HOUR = 60 * MINUTE;
const SPANS = [[MINUTE, "1 min"], [10 * MINUTE, "10 min"], [HOUR, "1 h"], [8 * HOUR, "8 h"]];
const STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200].map((s) => s * SECOND);
const LEAST = 10 * SECOND, MOST = 24 * HOUR;

export default {
  template: `
  <div class="sk-timeline">
    <div class="sk-bar">
      <h2>Memory</h2>
      <div class="sk-segmented" role="group" aria-label="time span">
        <button v-for="[ms, label] in spans" :key="label" :aria-pressed="!whole && span === ms" @click="zoom(ms)">{{ label }}</button>
        <button :aria-pressed="whole" @click="showAll" title="all that is held">all</button>
      </div>
      <button class="sk-button" :aria-pressed="live" @click="follow" title="go along with the newest frame (End)">live</button>
      <span class="sk-dim sk-range">{{ label(from, true) }} – {{ label(to, true) }}</span>
      <span class="sk-legend"><i class="evidence"></i>looked at<i class="alert"></i>alert<i class="drop"></i>dropped</span>
    </div>
    <div class="sk-view" ref="view" tabindex="0" role="group" @keydown="key" @wheel.prevent="wheel" @pointerdown="press"
         aria-label="timeline: arrow keys move, plus and minus zoom, Home shows all, End follows the newest frame">
      <div class="sk-strip">
        <button v-for="slot in slots" :key="slot.key" class="sk-thumb" :style="slot.style" @click="pick(slot.at)"
                :aria-label="'picture of ' + label(slot.at)"><img :src="slot.src" alt="" draggable="false" loading="lazy"
                @load="$event.target.classList.add('there')" @error="$event.target.classList.remove('there')" /></button>
        <span v-if="!data.newest" class="sk-dim sk-nothing">nothing seen yet</span>
      </div>
      <div class="sk-lane">
        <i v-for="[first, last, number] in data.segments" :key="'s' + first + number" class="sk-segment"
           :style="between(first, last)" :title="'segment ' + number"></i>
        <i v-for="[at, count] in shownDrops" :key="'d' + at" class="sk-drop" :style="place(at)" :title="count + ' dropped'"></i>
      </div>
      <button v-for="([ns, at, share], n) in evidence" :key="'e' + ns" class="sk-evidence" :style="place(at)"
              @click="$emit('open', { at: ns })" :aria-label="'looked at ' + label(at) + ', ' + percent(share)"
              :title="label(at) + ' · ' + percent(share)"><b :style="{ height: 8 + 22 * share + 'px' }"></b>
        <u v-if="n < (width < 600 ? 1 : 3)">{{ percent(share) }}</u></button>
      <button v-for="([ns, at, text], n) in alerts" :key="'a' + ns + n" class="sk-alert" :style="place(at)"
              @click="$emit('open', { at: ns })" :aria-label="'alert at ' + label(at) + ': ' + text" :title="text"></button>
      <div class="sk-axis"><span v-for="at in ticks" :key="at" :style="place(at)">{{ label(at) }}</span></div>
    </div>
  </div>`,
  props: { data: Object, url: String },
  emits: ["open"],
  data: () => ({ span: MINUTE, end: 0, live: true, whole: false, width: 800, spans: SPANS, fingers: new Map(), moved: 0 }),
  mounted() {
    this.observer = new ResizeObserver(() => { this.width = this.$refs.view.clientWidth || 800; });
    this.observer.observe(this.$refs.view);
  },
  unmounted() { this.observer.disconnect(); },
  computed: {
    to() { return this.live || this.whole ? this.data.newest + this.length / 80 : this.end; },   // a mark there is whole
    length() { return this.whole ? Math.max(LEAST, 1.03 * (this.data.newest - this.data.begin)) : this.span; },
    from() { return this.to - this.length; },
    slotWidth() { return this.width < 600 ? 72 : 104; },
    step() {
      const least = this.length * this.slotWidth / this.width;
      return STEPS.find((step) => step >= least) || Math.ceil(least / HOUR) * HOUR;
    },
    slots() {
      const slots = [], { begin, newest } = this.data;
      for (let k = Math.floor(this.from / this.step); newest && k * this.step < this.to; k++) {
        const at = (k + 0.5) * this.step;
        if (at > newest || (k + 1) * this.step < begin) continue;
        slots.push({
          key: this.url + this.step + "/" + k, at,
          src: `${this.url}&at=${Math.round(at)}000000&within=${this.step / 2000}`,
          style: { left: this.x(k * this.step) + "%", width: 100 * this.step / this.length + "%" },
        });
      }
      return slots;
    },
    ticks() {
      const every = this.step * (this.width < 600 ? 2 : 1), ticks = [];
      for (let at = Math.max(0, Math.ceil(this.from / every) * every); this.data.newest && at < this.to; at += every) ticks.push(at);
      return ticks;
    },
    shownDrops() { return this.data.drops.filter(([at]) => this.inside(at)); },
    evidence() { return this.data.evidence.filter(([, at]) => this.inside(at)); },
    alerts() { return this.data.alerts.filter(([, at]) => this.inside(at)); },
  },
  methods: {
    x(at) { return 100 * (at - this.from) / this.length; },
    inside(at) { return at >= this.from && at <= this.to; },
    place(at) { return { left: this.x(at) + "%" }; },
    between(first, last) {
      const left = Math.max(0, this.x(first)), right = Math.min(100, this.x(last));
      return { left: left + "%", width: Math.max(0, right - left) + "%", display: right < 0 || left > 100 ? "none" : "block" };
    },
    percent(share) { return Math.round(100 * share) + " %"; },
    label(at, exact) {
      if (!this.data.newest) return "–";
      if (at < 1e12) {    // a simulated clock: seconds since its beginning
        const s = Math.max(0, Math.round(at / SECOND)), two = (n) => String(n).padStart(2, "0");
        return (s >= 3600 ? Math.floor(s / 3600) + ":" : "") + two(Math.floor(s / 60) % 60) + ":" + two(s % 60);
      }
      const seconds = exact || this.step < MINUTE;
      const shown = { timeZone: "UTC", hourCycle: "h23", hour: "2-digit", minute: "2-digit", ...(seconds && { second: "2-digit" }) };
      return new Date(at + this.data.zone).toLocaleTimeString([], shown);
    },
    hold() { if (this.live || this.whole) { this.end = this.to; this.span = this.length; this.live = this.whole = false; } },
    follow() { this.whole = false; this.live = true; },
    showAll() { this.whole = this.live = true; },
    zoom(ms) {
      const middle = this.to - this.length / 2;
      this.whole = false;
      this.span = ms;
      if (!this.live) this.end = middle + ms / 2;
    },
    scale(factor, share) {      // about the place at this share of the width
      const at = this.from + share * this.length, length = Math.min(MOST, Math.max(LEAST, this.length * factor));
      if (this.live && share > 0.9) { this.whole = false; this.span = length; return; }
      this.hold();
      this.span = length;
      this.move(at + (1 - share) * length - this.end);
    },
    move(ms) {
      this.hold();
      this.end = Math.min(this.data.newest, Math.max(this.data.begin + 0.2 * this.span, this.end + ms));
      if (this.end >= this.data.newest && ms > 0) this.live = true;
    },
    show(at) { if (!this.inside(at)) { this.hold(); this.end = Math.min(this.data.newest, at + this.span / 2); } },
    pick(at) { if (this.moved < 5) this.$emit("open", { at: Math.round(at) + "000000" }); },
    wheel(event) {
      if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) { this.move(event.deltaX / this.width * this.length); return; }
      this.scale(Math.exp(event.deltaY / 400), (event.clientX - this.$refs.view.getBoundingClientRect().left) / this.width);
    },
    press(event) {
      if (event.button) return;
      this.fingers.set(event.pointerId, event.clientX);
      if (this.fingers.size > 1) return;
      this.moved = 0;
      const drag = (event) => this.drag(event), release = (event) => {
        this.fingers.delete(event.pointerId);
        if (this.fingers.size) return;
        window.removeEventListener("pointermove", drag);
        window.removeEventListener("pointerup", release);
        window.removeEventListener("pointercancel", release);
      };
      window.addEventListener("pointermove", drag);
      window.addEventListener("pointerup", release);
      window.addEventListener("pointercancel", release);
    },
    drag(event) {
      const before = this.fingers.get(event.pointerId);
      if (before === undefined) return;
      const apart = () => { const [a, b] = [...this.fingers.values()]; return Math.max(20, Math.abs(a - b)); };
      const wide = this.fingers.size > 1 && apart();
      this.fingers.set(event.pointerId, event.clientX);
      this.moved += Math.abs(event.clientX - before);
      if (wide) this.scale(wide / apart(), 0.5);
      else if (this.moved >= 5) this.move((before - event.clientX) / this.width * this.length);
    },
    key(event) {
      const does = {
        ArrowLeft: () => this.move(-this.length / 10), ArrowRight: () => this.move(this.length / 10),
        "+": () => this.scale(0.5, 1), "=": () => this.scale(0.5, 1), "-": () => this.scale(2, 1),
        Home: () => this.showAll(), End: () => this.follow(),
      }[event.key];
      if (does) { event.preventDefault(); does(); }
    },
  },
};
