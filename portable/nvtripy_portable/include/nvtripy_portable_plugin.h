/* A plug-in of the portable runtime as a C function.
 *
 * The function gets one call: its tensors, its fields and a pointer of whoever registered it. It writes the outputs, whose
 * shapes are known already, and returns 0; or it writes a text into `message` and returns anything else. It may be called from
 * any thread, though never twice at a time; it must neither change an input nor keep a pointer, nor throw, nor call the
 * runtime, but for `each`.
 *
 *     int twice(const NvtripyPortableCall* call) {
 *         const float* x = call->inputs[0].data;
 *         float* y = call->outputs[0].data;
 *         for (int64_t i = 0; i < nvtripy_portable_count(&call->inputs[0]); ++i) y[i] = 2 * x[i];
 *         return 0;
 *     }
 *
 * C99 and C++. What is here stays as it is; members may be added behind the last ones, with the next version.
 */
#ifndef NVTRIPY_PORTABLE_PLUGIN_H
#define NVTRIPY_PORTABLE_PLUGIN_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#define NVTRIPY_PORTABLE_PLUGIN_VERSION 1

/* Element types. int4 has one element a byte, bool too. */
enum {
    NVTRIPY_PORTABLE_FLOAT32 = 0,
    NVTRIPY_PORTABLE_FLOAT16 = 1,
    NVTRIPY_PORTABLE_BFLOAT16 = 2,
    NVTRIPY_PORTABLE_FLOAT8 = 3, /* E4M3FN */
    NVTRIPY_PORTABLE_INT4 = 4,
    NVTRIPY_PORTABLE_INT8 = 5,
    NVTRIPY_PORTABLE_INT32 = 6,
    NVTRIPY_PORTABLE_INT64 = 7,
    NVTRIPY_PORTABLE_BOOL = 8
};

/* In row-major order, without gaps. */
typedef struct NvtripyPortableTensor {
    void* data;
    int32_t dtype;
    int32_t rank;
    const int64_t* shape; /* of `rank` numbers */
} NvtripyPortableTensor;

/* What a field's values are, whatever its precision was declared to be. */
enum {
    NVTRIPY_PORTABLE_INTEGERS = 0, /* int64_t */
    NVTRIPY_PORTABLE_NUMBERS = 1,  /* double */
    NVTRIPY_PORTABLE_TEXT = 2      /* char, UTF-8, with a zero behind the `count` bytes */
};

typedef struct NvtripyPortableField {
    const char* name;
    int32_t type;
    int32_t reserved;
    int64_t count;
    const void* values;
} NvtripyPortableField;

typedef struct NvtripyPortableCall {
    int32_t version; /* NVTRIPY_PORTABLE_PLUGIN_VERSION of the runtime */
    int32_t num_inputs;
    int32_t num_outputs;
    int32_t num_fields; /* all that were registered: those not given have their defaults */
    const NvtripyPortableTensor* inputs;
    const NvtripyPortableTensor* outputs;
    const NvtripyPortableField* fields;
    void* context; /* as it was registered */
    char* message; /* room for the text of an error */
    size_t message_size;
    /* Calls work(unit, argument) for every unit from 0 to units - 1, on all threads of the runtime, and returns when all are
     * done. A result must not depend on which thread does what, and work must not call it again. */
    void (*each)(const struct NvtripyPortableCall* call, int64_t units, void (*work)(int64_t unit, void* argument),
                 void* argument);
    void* runtime; /* for `each` */
} NvtripyPortableCall;

typedef int (*NvtripyPortableFunction)(const NvtripyPortableCall* call);

/* How many elements a tensor has. */
static inline int64_t nvtripy_portable_count(const NvtripyPortableTensor* tensor) {
    int64_t count = 1;
    for (int32_t i = 0; i < tensor->rank; ++i) count *= tensor->shape[i];
    return count;
}

/* The field of that name, or NULL. */
static inline const NvtripyPortableField* nvtripy_portable_field(const NvtripyPortableCall* call, const char* name) {
    for (int32_t i = 0; i < call->num_fields; ++i)
        if (strcmp(call->fields[i].name, name) == 0) return &call->fields[i];
    return NULL;
}

/* The first value of an integer field; 0 where there is none. */
static inline int64_t nvtripy_portable_integer(const NvtripyPortableCall* call, const char* name) {
    const NvtripyPortableField* field = nvtripy_portable_field(call, name);
    return field && field->type == NVTRIPY_PORTABLE_INTEGERS && field->count > 0 ? *(const int64_t*)field->values : 0;
}

/* The first value of a floating-point field; 0 where there is none. */
static inline double nvtripy_portable_number(const NvtripyPortableCall* call, const char* name) {
    const NvtripyPortableField* field = nvtripy_portable_field(call, name);
    return field && field->type == NVTRIPY_PORTABLE_NUMBERS && field->count > 0 ? *(const double*)field->values : 0;
}

/* The value of a text field; "" where there is none. */
static inline const char* nvtripy_portable_text(const NvtripyPortableCall* call, const char* name) {
    const NvtripyPortableField* field = nvtripy_portable_field(call, name);
    return field && field->type == NVTRIPY_PORTABLE_TEXT ? (const char*)field->values : "";
}

#ifdef __cplusplus
}
#endif

#endif
