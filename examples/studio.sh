# All of it on a page in the browser. It prints an address, which is a key; Ctrl-C closes it, and jobs that run go on.
# The page lists the runs in ./runs, and offers the models and rows of the folders named here.
lorakeet studio --runs runs --folder examples/data --port 0
