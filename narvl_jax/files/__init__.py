"""Functions with which all modules read, write and check files.

Files are local or in an object store (gs://, s3://).

| module | what it does |
| --- | --- |
| `claims` | files with which processes exclude one another |
| `disk` | writes files atomically |
| `disk_errors` | explains errors of a disk in one line |
| `regular` | reads files that may have been replaced by a pipe or a device |
| `side_files` | JSON files whose damage must not end a run |
| `leftovers` | temporary files: their names, and removing old ones |
| `paths` | checks the paths in flags |
| `spool` | files that grow, which a store cannot append to |
| `stores` | makes paths of what users name, local or in a store |
| `store_path` | files in a store, with the methods of `pathlib.Path` |
| `store_errors` | errors of stores, in one line with advice |
| `store_cache` | local copies of files in stores, limited in size |
| `s3` | reads one version of an object in S3 |
| `processes` | identifies the process that wrote a file |
"""
