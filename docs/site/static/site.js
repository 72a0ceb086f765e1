// Prints with everything unfolded and in light colours, lets the keyboard scroll what is wider than its place (and marks it),
// and shows below each page that a search found where on it the words stand.
(() => {
  const folded = [];

  const page = document.documentElement;
  let colours;

  addEventListener("beforeprint", () => {
    colours = page.dataset.theme;
    page.dataset.theme = "light";
    for (const one of document.querySelectorAll("details:not([open])")) {
      one.open = true;
      folded.push(one);
    }
  });
  addEventListener("afterprint", () => {
    for (const one of folded.splice(0)) one.open = false;
    page.dataset.theme = colours;
  });

  const reachable = () => {
    for (const box of document.querySelectorAll(".wide, article p:has(> img), .panel, .formula, .pst-scrollable-table-container, article pre, .cell_output .output")) {
      const scrolls = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight;
      if (scrolls) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
      box.classList.toggle("sideways", box.scrollWidth > box.clientWidth + 1);
    }
  };
  addEventListener("load", reachable);
  addEventListener("resize", reachable);
  document.addEventListener("toggle", reachable, true); // a table that was folded has a width now

  // What stands where is in searchtext.js: [id, heading, text] of every section, page by page. A page
  // of a file may load a script, but may not read the pages that were found.
  addEventListener("DOMContentLoaded", () => {
    const results = document.querySelector(".bd-search-container #search-results");
    const words = (new URLSearchParams(location.search).get("q") || "").match(/[\p{L}\p{N}_]+/gu);
    if (!results || !words) return;

    // at the beginning of a word, in whatever form: "windows" finds "window"
    const found = words.map((word) => new RegExp(`(?<![\\p{L}\\p{N}])${word.replace(/(?<=...)s$/, "")}`, "iu"));
    const places = (sections) =>
      sections
        .map(([id, heading, text]) => ({ id, heading, text, score: found.filter((one) => one.test(`${heading} ${text}`)).length }))
        .filter((one) => one.score)
        .sort((a, b) => b.score - a.score)
        .slice(0, 3);

    const excerpt = (text) => {
      const line = document.createElement("p"), hit = found.map((one) => one.exec(text)).find(Boolean);
      if (!hit) return line;
      const at = hit.index, end = at + hit[0].length, from = Math.max(0, text.lastIndexOf(" ", Math.max(0, at - 70)));
      const mark = document.createElement("mark");
      mark.textContent = hit[0];
      line.append((from ? "… " : "") + text.slice(from, at), mark, text.slice(end, end + 90) + " …");
      return line;
    };

    const explained = new Set();
    const explain = (sections) => {
      for (const item of results.querySelectorAll("ul.search > li")) {
        const address = item.querySelector("a").getAttribute("href").replace(/[?#].*/, "");
        if (explained.has(address)) continue;
        explained.add(address);
        const list = document.createElement("ul");
        for (const place of places(sections[address] || [])) {
          const line = document.createElement("li"), link = document.createElement("a");
          link.href = `${address}#${place.id}`;
          link.textContent = place.heading;
          line.append(link, excerpt(place.text));
          list.append(line);
        }
        if (list.children.length) item.append(list);
      }
    };

    const script = document.createElement("script");
    script.src = `${page.dataset.content_root}searchtext.js`;
    script.onload = () => {
      explain(window.courseText);
      new MutationObserver(() => explain(window.courseText)).observe(results, { childList: true, subtree: true });
    };
    document.head.append(script);
  });
})();
