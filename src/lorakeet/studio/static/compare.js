// A comparison that waits for its measurements is loaded again until they are there.
if (document.querySelector("[data-reload]")) setTimeout(() => location.reload(), 2500);
