// An empty Python module: importing it runs the registrars of the operators linked into the same library.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#define RK_CONCAT_(a, b) a##b
#define RK_CONCAT(a, b) RK_CONCAT_(a, b)
#define RK_STRING_(a) #a
#define RK_STRING(a) RK_STRING_(a)

extern "C" PyMODINIT_FUNC RK_CONCAT(PyInit_, RK_MODULE)(void) {
  static struct PyModuleDef module = {
      PyModuleDef_HEAD_INIT, RK_STRING(RK_MODULE), nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
