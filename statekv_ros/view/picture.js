// A picture that changes without flicker: the next one is shown once it is loaded, and one that cannot be loaded is passed by.
export default {
  template: `
    <div class="sk-picture">
      <img v-if="shown" :src="shown" :alt="alt" draggable="false" />
      <span v-else class="sk-dim">{{ empty }}</span>
    </div>`,
  props: { src: String, alt: String, empty: String },
  data: () => ({ shown: "", loading: false }),
  watch: { src() { this.load(); } },
  mounted() { this.load(); },
  methods: {
    load() {
      if (!this.src) { this.shown = ""; return; }
      if (this.loading || this.src === this.shown) return;
      this.loading = true;
      const next = new Image(), src = this.src;
      const over = (found) => {
        this.loading = false;
        if (found) this.shown = src;
        if (this.src !== src) this.load();
      };
      next.onload = () => over(true);
      next.onerror = () => over(false);
      next.src = src;
    },
  },
};
