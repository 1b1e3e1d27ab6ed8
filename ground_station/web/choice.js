// What was chosen on the page, kept in its address so that a reload or a link shows the same. Leaves out what can be chosen.

export class Choice {
  constructor() {
    try {
      const tree = JSON.parse(decodeURIComponent(location.hash.slice(1)));
      this.tree = tree && typeof tree === "object" && !Array.isArray(tree) ? tree : {};
    } catch {
      this.tree = {};
    }
  }

  // The choice of that name, where it is of the default's kind.
  get(name, standard) {
    const value = Object.hasOwn(this.tree, name) ? this.tree[name] : undefined;
    if (value === undefined) return standard;
    if (standard === null || Array.isArray(standard)) {
      const fit = Array.isArray(value) && value.length <= 64 && value.every((one) => ["string", "number"].includes(typeof one));
      return fit ? value : standard;
    }
    return typeof value === typeof standard ? value : standard;
  }

  set(name, value) {
    this.tree[name] = value;
    history.replaceState(null, "", `#${encodeURIComponent(JSON.stringify(this.tree))}`);
  }
}
