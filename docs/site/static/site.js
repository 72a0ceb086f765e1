// Prints with everything unfolded and in light colours, and lets the keyboard scroll what is wider than its place.
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
    for (const box of document.querySelectorAll(".wide, .pst-scrollable-table-container, article pre, .cell_output .output")) {
      const scrolls = box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight;
      if (scrolls) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };
  addEventListener("load", reachable);
  addEventListener("resize", reachable);
  document.addEventListener("toggle", reachable, true); // a table that was folded has a width now
})();
