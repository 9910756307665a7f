/* Runs SQL on a database file and prints the rows: the program that the test links with SQLite. */
#include <stdio.h>
#include "sqlite3.h"
static int row(void *unused, int n, char **values, char **names) {
    for (int i = 0; i < n; i++) printf("%s%s", i ? "|" : "", values[i] ? values[i] : "");
    putchar('\n');
    return 0;
}
int main(int argc, char **argv) {
    sqlite3 *db; char *message = 0;
    if (argc != 3 || sqlite3_open(argv[1], &db)) return 2;
    if (sqlite3_exec(db, argv[2], row, 0, &message)) { fprintf(stderr, "query: %s\n", message); return 1; }
    return sqlite3_close(db);
}
