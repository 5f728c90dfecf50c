"use strict";
{
  const say = (text) => { document.getElementById("status").textContent = text; };

  // Sorting: one order over all rows, empty values last; what is equal stays in its order.
  const sortable = (table) => {
    const heads = [...table.tHead.rows[0].cells];
    const bodies = [...table.tBodies].map((body) => [body, [...body.rows]]);
    const rows = bodies.flatMap(([, own]) => own.filter((row) => !row.classList.contains("group")));
    const restore = document.querySelector(`[data-restore="${table.id}"]`);
    const clear = () => heads.forEach((head) => head.removeAttribute("aria-sort"));
    const sort = (place) => {
      const head = heads[place];
      const numeric = head.hasAttribute("data-numeric");
      // Of figures the largest stand first, of words the first of the alphabet.
      const first = numeric ? "descending" : "ascending";
      const other = numeric ? "ascending" : "descending";
      const order = head.getAttribute("aria-sort") === first ? other : first;
      const sign = order === "ascending" ? 1 : -1;
      const value = (row) => row.cells[place].dataset.sort;
      const compare = (one, two) => {
        const [a, b] = [value(one), value(two)];
        if (a === "" || b === "") return (a === "") - (b === "");
        return sign * (numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true }));
      };
      clear();
      head.setAttribute("aria-sort", order);
      bodies.forEach(([body]) => body.replaceChildren());
      bodies[0][0].append(...[...rows].sort(compare));
      if (restore) restore.disabled = false;
      say(`Sorted by ${head.dataset.name}, ${order}.`);
    };
    heads.forEach((head, place) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => sort(place));
    });
    if (restore) {
      restore.addEventListener("click", () => {
        bodies.forEach(([body, own]) => body.replaceChildren(...own));
        clear();
        restore.disabled = true;
        say("Rows in groups by budget.");
      });
    }
  };

  const filterable = (browser) => {
    const form = browser.querySelector("form");
    if (!form) return;
    const cards = [...browser.querySelectorAll(".question")];
    const chosen = (name) => form.querySelector(`[data-filter="${name}"]`).value;
    const apply = () => {
      const [task, kind, method] = ["task", "kind", "methods"].map(chosen);
      let shown = 0;
      for (const card of cards) {
        const fits = (!task || card.dataset.task === task) && (!kind || card.dataset.kind === kind)
          && (!method || card.dataset.methods.split(" ").includes(method));
        card.hidden = !fits;
        shown += fits;
        for (const row of card.querySelectorAll("[data-row]")) row.classList.toggle("chosen", row.dataset.row === method);
      }
      form.querySelector("output").textContent = `${shown} of ${cards.length} questions`;
    };
    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("change", apply);
    apply(); // a browser may have kept choices over a reload
  };

  document.querySelectorAll("table.sortable").forEach(sortable);
  document.querySelectorAll(".browser").forEach(filterable);
  document.querySelectorAll(".tools").forEach((tools) => { tools.hidden = false; });
}
