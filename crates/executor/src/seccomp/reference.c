// What libseccomp makes of a profile, for the test beside: reads it in lines, writes the filter to stdout, and to stderr the names
// that it does not know.
//
//   default ACTION
//   arch NAME
//   rule ACTION NAME COUNT [INDEX OPERATOR FIRST SECOND]...

#include <errno.h>
#include <seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static unsigned long long number(void)
{
	char *word = strtok(NULL, " \n");

	return word ? strtoull(word, NULL, 0) : 0;
}

int main(void)
{
	scmp_filter_ctx filter = NULL;
	char line[4096];

	while (fgets(line, sizeof(line), stdin)) {
		char *kind = strtok(line, " \n");

		if (!strcmp(kind, "default")) {
			filter = seccomp_init(number());
		} else if (!strcmp(kind, "arch")) {
			int error = seccomp_arch_add(filter, seccomp_arch_resolve_name(strtok(NULL, " \n")));

			if (error && error != -EEXIST)
				return 2;
		} else {
			struct scmp_arg_cmp conditions[6];
			unsigned action = number();
			char *name = strtok(NULL, " \n");
			int call = seccomp_syscall_resolve_name(name), count = number();

			for (int at = 0; at < count; at++) {
				conditions[at].arg = number();
				conditions[at].op = number();
				conditions[at].datum_a = number();
				conditions[at].datum_b = number();
			}
			if (call == __NR_SCMP_ERROR)
				fprintf(stderr, "%s\n", name);
			else if (seccomp_rule_add_array(filter, action, call, count, conditions))
				return 3;
		}
	}
	return seccomp_export_bpf(filter, 1) ? 4 : 0;
}
