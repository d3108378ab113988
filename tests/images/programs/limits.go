// Command limits is a Go program as many are deployed: one static file in an image without anything else. It serves what
// it found of its limits, does work on all its CPUs, and ends by itself when it is asked to.
package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

func file(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(text))
}

func limits(w http.ResponseWriter, _ *http.Request) {
	var info syscall.Sysinfo_t
	if err := syscall.Sysinfo(&info); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	fmt.Fprintf(w, "cpus=%d gomaxprocs=%d memory.max=%s cpu.max=%s machine-mib=%d\n", runtime.NumCPU(), runtime.GOMAXPROCS(0),
		file("/sys/fs/cgroup/memory.max"), file("/sys/fs/cgroup/cpu.max"), info.Totalram*uint64(info.Unit)>>20)
}

// work has a thousand goroutines of which each allocates, and says what all of them found.
func work(w http.ResponseWriter, _ *http.Request) {
	sums := make([][sha256.Size]byte, 1000)
	var all sync.WaitGroup
	for i := range sums {
		all.Go(func() {
			sums[i] = sha256.Sum256(make([]byte, 1<<16))
			time.Sleep(time.Millisecond)
		})
	}
	all.Wait()
	for _, sum := range sums {
		if sum != sums[0] {
			http.Error(w, "two sums differ", http.StatusInternalServerError)
			return
		}
	}
	fmt.Fprintf(w, "goroutines=%d sum=%x\n", len(sums), sums[0][:4])
}

func main() {
	asked, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	http.HandleFunc("/limits", limits)
	http.HandleFunc("/work", work)
	server := &http.Server{Addr: ":8080"}
	go func() {
		<-asked.Done()
		_ = server.Shutdown(context.Background())
	}()
	fmt.Println("serving")
	if err := server.ListenAndServe(); err != http.ErrServerClosed {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("ended as asked")
}
