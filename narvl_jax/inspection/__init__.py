"""Pages and pictures for people: what a model did, and how a run went.

| module        | content                                                    |
| ------------- | ---------------------------------------------------------- |
| `trace`       | one request: tokens, alignment and attention of each query |
| `picture`     | a trace as one picture                                     |
| `page`        | a trace as a page                                          |
| `run_page`    | a run as a page; any file of it may be missing             |
| `evaluations` | tables of evaluations and calibration                      |
| `charts`      | curves as inline SVG                                       |
| `markup`      | HTML that is escaped and needs no other file               |
"""
